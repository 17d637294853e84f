"""Logs: one JSON object a line on standard error, and nothing in them that names a patient.

Every log of the process goes through here, those of libraries too. Three things keep patients out:

- keys that name DICOM's patient attributes are dropped, whoever logs them;
- an exception is written as its type and the places it came through. Its text is written only where it is
  one of our own (:mod:`models.errors`), whose messages never hold a patient's data; libraries quote the
  values they stumble over;
- of the DICOM libraries' own lines only those are kept whose text is fixed, and of Python warnings only the
  category and the place.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import structlog

from models.errors import SegnodeError

_PATIENT_KEYS = frozenset(
    {
        "patient",
        "patientname",
        "patientid",
        "patientbirthdate",
        "patientbirthtime",
        "patientsex",
        "patientage",
        "patientaddress",
        "patienttelephonenumbers",
        "patientcomments",
        "otherpatientids",
        "otherpatientnames",
        "issuerofpatientid",
        "accessionnumber",
        "referringphysicianname",
        "physiciansofrecord",
        "performingphysicianname",
        "operatorsname",
        "institutionname",
        "dataset",
        "header",
        "secret",
        "apikey",
        "authorization",
    }
)

# Their lines quote elements of data sets, or repeat what our own logs say in the same moment.
_SILENT = ("pydicom", "highdicom", "pynetdicom", "python_multipart", "multipart")
_QUIET = ("uvicorn", "httpx", "httpcore", "alembic", "PIL", "numba", "asyncio")

EventDict = MutableMapping[str, Any]


def configure_logging(
    level: str = "INFO",
    *,
    component: str | None = None,
    stream: TextIO | None = None,
    as_json: bool | None = None,
) -> None:
    """Send every log of this process to ``stream`` (standard error), once and for all its libraries.

    Parameters
    ----------
    level : str
        DEBUG, INFO, WARNING or ERROR.
    component : str, optional
        Part of the node that this process is; written on every line.
    stream : file, optional
        Where the lines go.
    as_json : bool, optional
        JSON lines, or readable ones. Unless given: readable on a terminal, JSON elsewhere.
    """
    stream = stream or sys.stderr
    if as_json is None:
        as_json = not stream.isatty()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _Component(component),
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # One list for good: loggers that have been used hold on to it, and take what is configured anew.
    processors = structlog.get_config()["processors"] if structlog.is_configured() else []
    processors[:] = [
        structlog.stdlib.filter_by_level,
        *shared,
        structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
    ]
    structlog.configure(
        processors=processors,
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=stream.isatty())
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                describe_exception,
                drop_patient_data,
                renderer,
            ],
        )
    )
    handler.addFilter(_keeps_no_values)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _SILENT:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level)))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "pynetdicom"):  # they bring handlers
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    warnings.showwarning = _log_warning
    sys.excepthook = _log_uncaught


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger: ``log.info("instance.stored", instance_id=…)``. The event is a fixed text, no data in it."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def drop_patient_data(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Remove every key, at any depth, that names a patient attribute, in any spelling."""
    for key in list(event):
        if _is_patient_key(key):
            del event[key]
        elif isinstance(event[key], dict):
            event[key] = drop_patient_data(None, "", dict(event[key]))
    return event


def describe_exception(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Turn ``exc_info`` into type, code and places; the text only of errors of our own."""
    info = event.pop("exc_info", None)
    event.pop("exception", None)
    if info is True:
        info = sys.exc_info()
    elif isinstance(info, BaseException):
        info = (type(info), info, info.__traceback__)
    if isinstance(info, tuple) and info[1] is not None:
        event["error"] = _describe(info[1])
    return event


def _describe(error: BaseException) -> dict[str, Any]:
    described: dict[str, Any] = {"type": f"{type(error).__module__}.{type(error).__qualname__}"}
    if isinstance(error, SegnodeError):
        described |= {"code": error.code, "message": error.message, "remedy": error.remedy}
    elif isinstance(error, OSError) and error.errno is not None:
        described["errno"] = error.errno
    described["at"] = [
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)[-8:]
    ]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        described["cause"] = _describe(cause)
    return described


class _Component:
    """Writes the name of the process's part on every line."""

    def __init__(self, component: str | None) -> None:
        self._component = component

    def __call__(self, _logger: Any, _method: str, event: EventDict) -> EventDict:
        if self._component is not None:
            event.setdefault("component", self._component)
        return event


def _is_patient_key(key: str) -> bool:
    return key.replace("_", "").replace(" ", "").replace("-", "").lower() in _PATIENT_KEYS


def _keeps_no_values(record: logging.LogRecord) -> bool:
    """Put the type of an exception in the place of its text, where a library logs the exception itself."""
    values = record.args if isinstance(record.args, tuple) else ()
    for value in (record.msg, *values):
        if isinstance(value, BaseException) and not isinstance(value, SegnodeError):
            record.msg, record.args = f"{type(value).__name__} in {record.name}", ()
            record.exc_info = record.exc_info or (type(value), value, value.__traceback__)
            break
    return True


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    get_logger("warnings").debug("python.warning", category=category.__name__, at=f"{filename}:{lineno}")


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    get_logger("segnode").critical("uncaught", exc_info=(kind, error, trace))
