"""What the interface says of itself holds: its roles for each operation, and no request makes it fail.

Everything here is generated from the OpenAPI document, so that a new operation is held against it by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from api_harness import MEDIA_TYPE, STUDY, ApiHarness, assert_problem
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import APIOperation, Case, GenerationMode
from structlog.testing import capture_logs

from service.api.access import MINIMUM_ROLE
from service.records.database import Records
from service.records.migrate import upgrade
from service.records.tables import Role

ROLES = [role.value for role in (Role.UPLOADER, Role.OPERATOR, Role.ADMIN)]

# What no key is asked for, on loopback.
OPEN = {"read_health", "read_readiness", "read_metrics"}

_VALUES = {"study_instance_uid": STUDY, "name": "threshold", "version": "1.0.0"}
_IDENTIFIER = "0" * 32
_METHODS = {"get", "post", "put", "patch", "delete"}
_EXAMPLES = 10  # of each operation and kind; all of it is the same in every run

_NOT_HTTP = re.compile(r"[^\x20-\x7e]")


@dataclass(frozen=True)
class Operation:
    name: str
    method: str
    path: str  # with values in the place of its parameters


@pytest.fixture(scope="module")
def module_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiHarness]:
    """One interface for all operations, with something of everything in it, and no limit of rates."""
    folder: Path = tmp_path_factory.mktemp("contract")
    url = f"sqlite:///{folder / 'records.sqlite'}"
    upgrade(url)
    records = Records(url)
    with capture_logs():
        api = ApiHarness(
            folder,
            records,
            storage={"low_watermark_bytes": 0, "reserve_bytes": 0},
            http={"rates": {"address": None, "key": None}},
        )
        api.install()
        api.succeed(api.enqueue(owner="uploader"))
        api.enqueue(instances=[api.receive_instance()])
        yield api
    records.close()


def operations(document: dict[str, Any]) -> list[Operation]:
    found = []
    for template, item in document["paths"].items():
        path = re.sub(r"\{(\w+)\}", lambda m: _VALUES.get(m.group(1), _IDENTIFIER), template)
        for method in _METHODS & set(item):
            found.append(Operation(item[method]["operationId"], method.upper(), path))
    return sorted(found, key=lambda each: each.name)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_makes_the_interface_fail(module_api: ApiHarness, mode: GenerationMode) -> None:
    """Requests as the document allows them, and others that break it in every place."""
    schema = schemathesis.openapi.from_dict(module_api.app.openapi())
    tried = sum(fuzz(module_api, result.ok(), mode) for result in schema.get_all_operations())
    assert tried > 100


def fuzz(api: ApiHarness, operation: APIOperation, mode: GenerationMode) -> int:
    """Send what is generated for one operation, and judge the answers; how many there were."""
    statuses: list[int] = []

    @settings(
        max_examples=_EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def try_out(case: Case) -> None:
        response = send(api, case)
        statuses.append(response.status_code)
        where = f"{case.method} {case.formatted_path} {case.query} {case.body!r}: {response.text}"
        allowed = {"read_readiness": 503}.get(operation.definition.raw["operationId"])  # no model, and so on
        assert response.status_code < 500 or response.status_code == allowed, where
        if response.status_code == allowed:
            return
        if response.status_code >= 400:
            assert response.headers["content-type"] == MEDIA_TYPE, where
            assert response.json()["status"] == response.status_code
        assert str(response.status_code) in operation.definition.raw["responses"], where

    try:
        try_out()
    except Unsatisfiable:  # an operation without any parameter cannot be broken
        assert mode is GenerationMode.NEGATIVE
        assert not statuses
    return len(statuses)


def send(api: ApiHarness, case: Case) -> httpx.Response:
    """The request of a case, as requests would put it on the wire, to the application."""
    arguments = case.as_transport_kwargs(base_url="http://localhost")
    arguments["headers"] = {
        name: _NOT_HTTP.sub("", str(value)) for name, value in dict(arguments.get("headers") or {}).items()
    } | api.headers("admin")
    prepared = requests.Request(
        **{
            name: value
            for name, value in arguments.items()
            if name in ("method", "url", "headers", "files", "data", "params", "auth", "cookies", "json")
        }
    ).prepare()
    body = prepared.body
    content = body.encode() if isinstance(body, str) else bytes(body) if body else None
    assert prepared.url is not None
    return api.request(
        str(prepared.method),
        prepared.url.removeprefix("http://localhost"),
        headers=dict(prepared.headers),
        content=content,
    )


def test_every_operation_has_a_role_and_keeps_to_it(module_api: ApiHarness) -> None:
    document = module_api.app.openapi()
    found = operations(document)
    assert {each.name for each in found} - OPEN == set(MINIMUM_ROLE)
    assert len({each.name for each in found}) == len(found)
    for each in found:
        if each.name in OPEN:
            assert module_api.request(each.method, each.path, key=None).status_code not in (401, 403)
            continue
        assert_problem(module_api.request(each.method, each.path, key=None), 401, "KEY_MISSING")
        lowest = ROLES.index(MINIMUM_ROLE[each.name].value)
        for rank, role in enumerate(ROLES):
            response = module_api.request(each.method, each.path, key=role)
            if rank < lowest:
                assert_problem(response, 403, "ROLE_TOO_LOW")
            else:
                assert response.status_code not in (401, 403), (each, role, response.text)
                assert response.status_code < 500, (each, role, response.text)


def test_every_operation_says_that_it_takes_a_key_and_how_it_refuses(module_api: ApiHarness) -> None:
    document = module_api.app.openapi()
    for template, item in document["paths"].items():
        for method in _METHODS & set(item):
            operation = item[method]
            if operation["operationId"] in OPEN:
                continue
            assert operation["security"] == [{"key": []}], template
            assert {"401", "403", "413", "422", "429", "503"} <= set(operation["responses"]), template
