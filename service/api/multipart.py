"""A multipart/form-data body, taken apart as it arrives: files into an upload, small fields into memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from service.api.problem import ProblemError
from service.uploads import Upload

MAX_FILES = 16
MAX_FIELDS = 8
MAX_FIELD_BYTES = 1024
_FLUSH_BYTES = 1 << 20

_Step = Callable[[], None]


@dataclass
class _Part:
    """The part that is being read."""

    disposition: bytes = b""
    name: str = ""
    is_file: bool = False
    value: bytearray = field(default_factory=bytearray)


class _Form:
    """Collects what a parser reports: the values of fields, and the steps to take on the upload."""

    def __init__(self, upload: Upload, *, file_field: str, field_names: frozenset[str]) -> None:
        self._upload = upload
        self._file_field = file_field
        self._field_names = field_names
        self._part = _Part()
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._n_files = 0
        self.fields: dict[str, str] = {}
        self.steps: list[_Step] = []
        self.pending_bytes = 0
        self.complete = False

    def parser(self, boundary: bytes) -> MultipartParser:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_begin": self._begin_header,
                "on_header_field": partial(self._header_data, 0),
                "on_header_value": partial(self._header_data, 1),
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_content,
                "on_part_data": self._content,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def _begin_part(self) -> None:
        self._part = _Part()

    def _begin_header(self) -> None:
        self._header = (bytearray(), bytearray())

    def _header_data(self, which: int, data: bytes, start: int, end: int) -> None:
        self._header[which].extend(data[start:end])

    def _end_header(self) -> None:
        if bytes(self._header[0]).lower() == b"content-disposition":
            self._part.disposition = bytes(self._header[1])

    def _begin_content(self) -> None:
        _, options = parse_options_header(self._part.disposition)
        self._part.name = _text(options.get(b"name", b""), "A part's name")
        self._part.is_file = b"filename" in options or self._part.name == self._file_field
        if self._part.is_file:
            self._begin_file()
        elif self._part.name not in self._field_names:
            raise _malformed(
                f"A field that is not known was sent; known are {', '.join(sorted(self._field_names))} "
                f"and the file(s) in {self._file_field}."
            )
        elif self._part.name in self.fields:
            raise _malformed(f"The field {self._part.name} was sent twice.")

    def _begin_file(self) -> None:
        if self._part.name != self._file_field:
            raise _malformed(f"A file was sent in another field than {self._file_field}.")
        self._n_files += 1
        if self._n_files > MAX_FILES:
            raise _malformed(f"More than {MAX_FILES} files were sent.")
        self.steps.append(self._upload.start_file)

    def _content(self, data: bytes, start: int, end: int) -> None:
        if self._part.is_file:
            self.steps.append(partial(self._upload.write, data[start:end]))
            self.pending_bytes += end - start
            return
        self._part.value.extend(data[start:end])
        if len(self._part.value) > MAX_FIELD_BYTES:
            raise _malformed(f"The field {self._part.name} has more than {MAX_FIELD_BYTES} bytes.")

    def _end_part(self) -> None:
        if self._part.is_file:
            self.steps.append(self._upload.end_file)
            return
        self.fields[self._part.name] = _text(bytes(self._part.value), f"The field {self._part.name}")

    def _end(self) -> None:
        self.complete = True


async def receive_form(
    request: Request, upload: Upload, *, file_field: str, field_names: frozenset[str]
) -> dict[str, str]:
    """Read the whole body: files go into ``upload``, the values of the other fields are returned.

    Raises
    ------
    ProblemError
        415 for another media type, 400 for a body that is not what it says.
    UploadTooLargeError, StorageFullError
        As :meth:`Upload.account`.
    """
    form = _Form(upload, file_field=file_field, field_names=field_names)
    try:
        parser = form.parser(_boundary(request))
        async for chunk in request.stream():
            if not chunk:
                continue
            upload.account(len(chunk))
            parser.write(chunk)
            if form.pending_bytes > _FLUSH_BYTES or len(form.steps) > _FLUSH_BYTES // 1024:
                await run_in_threadpool(_take, form)
        parser.finalize()
    except FormParserError as error:
        raise _malformed("The body is not the multipart/form-data that it says to be.") from error
    if not form.complete:
        raise _malformed("The body ends before its last boundary: it was cut off.")
    await run_in_threadpool(_take, form)
    return form.fields


def declared_length(request: Request) -> int | None:
    """What the request says its body's size is; None where it does not say."""
    length = request.headers.get("content-length")
    return None if length is None else int(length)


def require_json(request: Request) -> None:
    """Raises ProblemError 415 for a body that does not say that it is JSON."""
    media_type, _ = parse_options_header(request.headers.get("content-type"))
    if media_type != b"application/json":
        raise ProblemError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "UNSUPPORTED_MEDIA_TYPE",
            "This path takes application/json only.",
            remedy="Send JSON, and say so in Content-Type.",
        )


def _take(form: _Form) -> None:
    for step in form.steps:
        step()
    form.steps.clear()
    form.pending_bytes = 0


def _boundary(request: Request) -> bytes:
    media_type, options = parse_options_header(request.headers.get("content-type"))
    if media_type != b"multipart/form-data":
        raise ProblemError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "UNSUPPORTED_MEDIA_TYPE",
            "Files are taken as multipart/form-data only.",
            remedy="Send a form with the files, as browsers and `curl --form` do.",
        )
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise _malformed("Content-Type names no boundary.")
    return boundary


def _text(data: bytes, what: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _malformed(f"{what} is not UTF-8.") from error
    return text


def _malformed(detail: str) -> ProblemError:
    return ProblemError(HTTPStatus.BAD_REQUEST, "MALFORMED", detail, remedy="Correct the request.")
