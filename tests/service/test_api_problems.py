"""Every error is a problem, the description of the interface is true, and no request breaks it."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from api_harness import MEDIA_TYPE, STUDY, ApiHarness, assert_problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openapi_spec_validator import validate
from structlog.testing import capture_logs

from models.errors import SegnodeError
from service.api import problem as problem_module
from service.api.problem import Problem, problem_of
from service.records.database import Records
from service.records.migrate import upgrade

OPEN = {"/healthz", "/readyz"}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiHarness]:
    """A node with something of everything, for requests that change little."""
    folder = tmp_path_factory.mktemp("filled")
    url = f"sqlite:///{folder / 'records.sqlite'}"
    upgrade(url)
    records = Records(url)
    with capture_logs():
        storage = {"low_watermark_bytes": 0, "reserve_bytes": 0}
        api = ApiHarness(folder, records, storage=storage, http={"maximum_upload_bytes": 100_000})
        api.install()
        api.succeed(api.enqueue(instances=[api.receive_instance()], destinations=["pacs"], owner="uploader"))
        yield api
    records.close()


@pytest.fixture(scope="module")
def document(filled: ApiHarness) -> dict[str, Any]:
    return dict(filled.get("/api/v1/openapi.json", key=None).json())


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def test_the_description_is_valid_openapi(document: dict[str, Any]) -> None:
    validate(document)
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names) == 40


def test_every_error_is_described_as_a_problem(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["Problem"]
    assert {"type", "title", "status", "code", "detail", "remedy"} <= set(schema["properties"])
    assert schema["examples"]
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for method, path, operation in operations(document):
        errors = {status for status in operation["responses"] if int(status) >= 400}
        if path not in OPEN:
            assert {"401", "403", "500", "503"} <= errors, (method, path)
        for status in errors - ({"503"} if path == "/readyz" else set()):
            content = operation["responses"][status]["content"]
            assert content == {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}, (
                method,
                path,
            )
        assert operation["summary"]
        assert bool(operation.get("security")) == (path not in OPEN)


def test_every_answer_without_error_is_described(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        for status, response in operation["responses"].items():
            if int(status) < 400 and int(status) != HTTPStatus.NO_CONTENT:
                assert response["content"], (method, path, status)
                assert all(media["schema"] for media in response["content"].values()), (method, path, status)


def test_every_error_of_the_product_has_a_status() -> None:
    def kinds(of: type[SegnodeError]) -> Iterator[type[SegnodeError]]:
        yield of
        for kind in of.__subclasses__():
            yield from kinds(kind)

    for kind in kinds(SegnodeError):
        if kind.__init__ is not SegnodeError.__init__:
            continue  # made of more than a sentence; tested where it is raised
        problem = problem_of(kind("Something is 3 of 5.", remedy="Do this."))
        assert (problem.detail, problem.remedy) == ("Something is 3 of 5.", "Do this.")
        assert problem.code == kind.code
        assert 400 <= problem.status < 600
    assert len(problem_module._STATUS) > 10


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "NO_SUCH_PATH"),
        ("GET", "/docs", 404, "NO_SUCH_PATH"),
        ("GET", "/api/v1/nothing", 404, "NO_SUCH_PATH"),
        ("GET", "/api/v1/jobs/", 404, "NO_SUCH_PATH"),
        ("PUT", "/api/v1/jobs", 405, "METHOD_NOT_ALLOWED"),
        ("TRACE", "/healthz", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/api/v1/jobs?limit=nan", 422, "INVALID_REQUEST"),
    ],
)
def test_errors_of_the_framework_are_problems_too(
    filled: ApiHarness, method: str, path: str, status: int, code: str
) -> None:
    response = filled.request(method, path)
    assert_problem(response, status, code)
    assert (status == 405) == ("allow" in response.headers)


def test_an_unexpected_error_tells_nothing_but_that_it_happened(
    api: ApiHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> list[str]:
        raise ZeroDivisionError("Schuster^Hannelore")

    monkeypatch.setattr(api.registry, "names", fail)
    with capture_logs() as logs:
        response = api.get("/api/v1/models")
    assert_problem(response, 500, "INTERNAL_ERROR")
    assert "Schuster" not in response.text
    assert "ZeroDivision" not in response.text
    assert [line["event"] for line in logs] == ["http.unexpected"]
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/healthz", "/api/v1/jobs", "/nothing", "/api/v1/openapi.json"])
def test_every_answer_carries_the_headers_of_security(filled: ApiHarness, path: str) -> None:
    headers = filled.get(path, key=None).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "strict-transport-security" not in headers


def test_behind_tls_browsers_are_told_to_stay_there(tmp_path: Path, records: Records) -> None:
    api = ApiHarness(tmp_path, records, http={"host": "0.0.0.0", "behind_tls_proxy": True})
    response = api.get("/healthz", key=None, headers={"Host": "node.hospital.example"})
    assert response.status_code == 200
    assert response.headers["strict-transport-security"]


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost", True),
        ("LOCALHOST:8080", True),
        ("127.0.0.1:8080", True),
        ("[::1]:8080", True),
        ("[::1]", True),
        ("evil.example", False),
        ("localhost.evil.example:8080", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
    ],
)
def test_on_loopback_only_its_own_names_are_answered(filled: ApiHarness, host: str, known: bool) -> None:
    response = filled.get("/healthz", key=None, headers={"Host": host})
    if known:
        assert response.status_code == 200
    else:
        assert_problem(response, 421, "HOST_UNKNOWN")


@pytest.mark.parametrize(
    ("length", "status", "code"),
    [
        ("65537", 413, "BODY_TOO_LARGE"),
        ("9" * 400, 413, "BODY_TOO_LARGE"),
        ("-1", 400, "MALFORMED"),
        ("x", 400, "MALFORMED"),
    ],
)
def test_a_length_that_cannot_be_is_refused_at_once(
    filled: ApiHarness, length: str, status: int, code: str
) -> None:
    headers = {"Content-Length": length, "Content-Type": "application/json"}
    for path in ("/api/v1/models/threshold/activate", "/healthz", "/nothing"):
        assert_problem(filled.post(path, content=b"{}", headers=headers), status, code)


def test_a_small_body_of_unknown_length_is_read_to_its_limit_only(filled: ApiHarness) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while taken < 10_000_000:
            taken += 1000
            yield b" " * 1000

    response = filled.post(
        "/api/v1/models/threshold/activate", content=endless(), headers={"Content-Type": "application/json"}
    )
    assert_problem(response, 413, "BODY_TOO_LARGE")
    assert taken < 70_000


# --- whatever comes

_SENSIBLE: dict[str, list[str]] = {
    "job_id": ["0" * 32],
    "delivery_id": ["0" * 32],
    "result_id": ["0" * 32],
    "case_id": ["0" * 32],
    "study_instance_uid": [STUDY, "1.2.3"],
    "name": ["threshold", "nothing"],
    "version": ["1.0.0", "2.0.0"],
}
_TEXT = st.text(st.characters(exclude_characters="/?#", exclude_categories=["Cs"]), min_size=1, max_size=40)
_QUERIES = st.dictionaries(
    st.sampled_from(["limit", "after", "state", "model", "destination", "kind", "alert", "x"]),
    st.one_of(_TEXT, st.integers().map(str), st.sampled_from(["queued", "parked", "true", "0" * 32, STUDY])),
    max_size=3,
)
_FORM = st.lists(
    st.tuples(
        st.sampled_from(["files", "bundle", "model", "version", "x"]), st.booleans(), st.binary(max_size=600)
    ),
    max_size=4,
).map(
    lambda parts: (
        b"".join(
            b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
            % (name.encode(), b'; filename="f"' if is_file else b"", content)
            for name, is_file, content in parts
        )
        + b"--b--\r\n"
    )
)
_BODIES = st.one_of(
    st.tuples(st.just("multipart/form-data; boundary=b"), st.one_of(_FORM, st.binary(max_size=300))),
    st.tuples(
        st.just("application/json"),
        st.one_of(
            st.binary(max_size=50),
            st.dictionaries(_TEXT, st.one_of(_TEXT, st.none(), st.booleans()), max_size=3).map(
                lambda value: json.dumps(value).encode()
            ),
            st.just(b'{"version": "1.0.0"}'),
        ),
    ),
    st.tuples(_TEXT.filter(lambda t: t.isprintable() and t.isascii()), st.binary(max_size=50)),
)


@settings(
    deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(data=st.data())
def test_whatever_comes_is_answered_as_described(
    filled: ApiHarness, document: dict[str, Any], data: st.DataObject
) -> None:
    method, path, operation = data.draw(st.sampled_from(list(operations(document))))
    for parameter in re.findall(r"\{(\w+)\}", path):
        value = data.draw(st.one_of(st.sampled_from(_SENSIBLE[parameter]), _TEXT))
        path = path.replace(f"{{{parameter}}}", quote(value, safe=""))
    content_type, body = data.draw(_BODIES)
    key = data.draw(st.sampled_from(["uploader", "operator", "admin", None]))
    response = filled.request(
        method,
        path,
        key=key,
        params=data.draw(_QUERIES),
        content=body if method == "POST" else b"",
        headers={"Content-Type": content_type} if method == "POST" else {},
    )
    if response.status_code == 404 and response.json()["code"] == "NO_SUCH_PATH":
        return  # a value with a dot segment has made another path of it
    assert str(response.status_code) in operation["responses"], response.text
    assert response.status_code < 500 or path == "/readyz", response.text
    if response.status_code >= 400 and path != "/readyz":
        assert response.headers["content-type"] == MEDIA_TYPE
        Problem.model_validate(response.json())
