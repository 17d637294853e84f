"""The operator's page, without a browser: who gets in, what each role sees, and what a form does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_harness import STUDY, ApiHarness, assert_problem
from sqlalchemy import select, text
from structlog.testing import capture_logs

from service.api import create_app
from service.api.access import CSRF_HEADER, MINIMUM_ROLE, SESSION_COOKIES
from service.console import build_console
from service.console.frame import MENU, safe_next
from service.keys import create_key, revoke
from service.records.database import Records
from service.records.gates import claim_gate, finish_gate
from service.records.governance_tables import Comparison, ComparisonState, Shadow
from service.records.jobs import refuse_job
from service.records.login_tables import PersonSession
from service.records.tables import Delivery, DeliveryState, Event, Job, JobState, ResultKind, Role

COOKIE = SESSION_COOKIES[False]
IDLE, LONGEST = timedelta(minutes=30), timedelta(hours=12)
HOSTILE = '<script>alert("x")</script>'


class Browser:
    """Keeps the cookie, and reads forms, as a browser does; it follows no redirect by itself."""

    def __init__(self, api: ApiHarness) -> None:
        self.api = api
        self.cookie: str | None = None

    def _keep(self, response: httpx.Response) -> httpx.Response:
        if COOKIE in response.cookies:
            self.cookie = response.cookies[COOKIE]
        return response

    def _headers(self) -> dict[str, str]:
        return {"Cookie": f"{COOKIE}={self.cookie}"} if self.cookie else {}

    def get(self, path: str) -> httpx.Response:
        return self._keep(self.api.get(f"/console/{path}", key=None, headers=self._headers()))

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return self._keep(self.api.post(f"/console/{path}", key=None, headers=self._headers(), data=fields))

    def log_in(self, key: str) -> httpx.Response:
        return self.post("login", key=self.api.secrets[key])

    def token(self) -> str:
        found = re.search(r'name="form_token" value="([0-9a-f]{64})"', self.get("queue").text)
        assert found is not None
        return found.group(1)


@pytest.fixture
def api(tmp_path: Path, records: Records) -> Iterator[ApiHarness]:
    """As the other tests' own, without the gate, which one test here asks for."""
    storage = {"low_watermark_bytes": 0, "reserve_bytes": 0}
    with capture_logs():
        yield ApiHarness(tmp_path, records, storage=storage, models={"require_gate": False})


@pytest.fixture
def browser(api: ApiHarness) -> Browser:
    build_console(api.app, api.app.state.api)
    return Browser(api)


@pytest.fixture
def operator(browser: Browser) -> Browser:
    browser.log_in("operator")
    return browser


@pytest.fixture
def admin(browser: Browser) -> Browser:
    browser.log_in("admin")
    return browser


def events(api: ApiHarness, kind: str) -> list[Event]:
    with api.records.read() as session:
        return list(session.scalars(select(Event).where(Event.kind == kind)))


@pytest.mark.parametrize("path", [path for path, _, _ in MENU])
def test_without_a_session_every_page_asks_to_log_in_and_comes_back(browser: Browser, path: str) -> None:
    response = browser.get(path)
    assert response.status_code == 303
    assert response.headers["location"] == f"/console/login?next=/console/{path}"
    assert f'value="/console/{path}"' in browser.get(f"login?next=/console/{path}").text


def test_a_key_begins_a_session_and_its_secret_is_not_in_the_cookie(
    browser: Browser, api: ApiHarness
) -> None:
    response = browser.post("login", key=api.secrets["operator"], next="/console/studies")
    assert (response.status_code, response.headers["location"]) == (303, "/console/studies")
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert api.secrets["operator"] not in cookie
    assert browser.get("queue").status_code == 200
    assert [e.actor for e in events(api, "console.login")] == ["operator"]


def test_a_wrong_key_is_told_recorded_and_begins_nothing(browser: Browser, api: ApiHarness) -> None:
    response = browser.post("login", key="sgn_" + "x" * 43)
    assert response.status_code == 401
    assert "unknown, revoked or expired" in response.text
    assert browser.cookie is None
    assert len(events(api, "console.login_refused")) == 1


def test_a_key_that_is_revoked_or_expires_ends_its_session_at_once(
    browser: Browser, operator: Browser, api: ApiHarness
) -> None:
    with api.records.write() as session:
        revoke(session, api.key_ids["operator"], now=api.now)
    assert operator.get("queue").status_code == 303
    with api.records.write() as session:
        soon = api.now + timedelta(minutes=5)
        _, api.secrets["guest"] = create_key(session, "guest", Role.OPERATOR, soon, now=api.now)
    browser.log_in("guest")
    assert browser.get("queue").status_code == 200
    api.now += timedelta(minutes=5)
    assert browser.get("queue").status_code == 303


def test_a_session_ends_when_it_is_not_used_and_when_it_is_old(operator: Browser, api: ApiHarness) -> None:
    api.now += IDLE - timedelta(minutes=1)
    assert operator.get("queue").status_code == 200  # and is used now
    api.now += IDLE - timedelta(minutes=1)
    assert operator.get("queue").status_code == 200
    api.now += IDLE
    assert operator.get("queue").status_code == 303
    operator.log_in("operator")
    for _ in range(int(LONGEST / timedelta(minutes=25))):
        api.now += timedelta(minutes=25)
        assert operator.get("queue").status_code == 200
    api.now += timedelta(minutes=25)
    assert operator.get("queue").status_code == 303


def test_how_long_a_session_lasts_is_configured(tmp_path: Path, records: Records) -> None:
    with capture_logs():
        api = ApiHarness(tmp_path, records, http={"sessions": {"idle_s": 300, "longest_s": 400}})
    build_console(api.app, api.app.state.api)
    browser = Browser(api)
    assert "Max-Age=400;" in browser.log_in("operator").headers["set-cookie"]
    api.now += timedelta(seconds=290)
    assert browser.get("queue").status_code == 200
    api.now += timedelta(seconds=109)
    assert browser.get("queue").status_code == 200
    api.now += timedelta(seconds=1)
    assert browser.get("queue").status_code == 303


def test_a_cookie_that_was_changed_or_made_elsewhere_is_none(operator: Browser, api: ApiHarness) -> None:
    secret = operator.cookie
    assert secret is not None
    with api.records.read() as session:
        (kept,) = session.scalars(select(PersonSession.session_hash))
    for cookie in (f"{secret}x", secret[:-1], kept, "", ".", "x" * 5000, "é.é"):
        operator.cookie = cookie.encode("ascii", "ignore").decode()
        assert operator.get("queue").status_code == 303, cookie


def test_logging_out_ends_the_session_and_takes_the_cookie_away(operator: Browser, api: ApiHarness) -> None:
    stolen = operator.cookie
    response = operator.post("logout", form_token=operator.token())
    assert response.status_code == 303
    assert f'{COOKIE}=""' in response.headers["set-cookie"]
    operator.cookie = stolen  # whoever has copied it has nothing
    assert operator.get("queue").status_code == 303
    with api.records.read() as session:
        assert session.scalars(select(PersonSession)).all() == []
    assert [e.actor for e in events(api, "logout")] == ["operator"]


def test_logging_in_again_ends_the_session_before_and_a_wrong_key_does_not(
    operator: Browser, api: ApiHarness
) -> None:
    first = operator.cookie
    operator.post("login", key="sgn_" + "x" * 43)
    assert operator.get("queue").status_code == 200
    operator.log_in("admin")
    assert operator.cookie != first
    operator.cookie = first
    assert operator.get("queue").status_code == 303


def test_a_session_that_began_with_a_key_reaches_the_interface_under_its_token(
    operator: Browser, api: ApiHarness
) -> None:
    cookie = {"Cookie": f"{COOKIE}={operator.cookie}"}
    job_id = api.enqueue(instances=[api.receive_instance()])
    assert api.get("/api/v1/jobs", key=None, headers=cookie).status_code == 200
    assert_problem(api.get("/api/v1/models", key=None, headers=cookie), 403, "ROLE_TOO_LOW")
    path = f"/api/v1/jobs/{job_id}/retry"
    assert_problem(api.post(path, key=None, headers=cookie), 403, "CSRF_TOKEN_MISSING")
    with_token = cookie | {CSRF_HEADER: operator.token()}
    assert_problem(api.post(path, key=None, headers=with_token), 409, "CONFLICT")  # it waits already


@pytest.mark.parametrize("role", list(Role))
def test_each_role_sees_the_pages_of_its_operations_and_no_other(browser: Browser, role: Role) -> None:
    browser.log_in(role.value)
    rank = list(Role)
    for path, title, operation in MENU:
        allowed = rank.index(role) >= rank.index(MINIMUM_ROLE[operation])
        page = browser.get(path)
        assert page.status_code == (200 if allowed else 403), path
        assert (f'<a href="/console/{path}"' in page.text) == allowed, title


@pytest.mark.parametrize(
    "path",
    ["jobs/{job}/retry", "deliveries/{job}/retry", "destinations/pacs/echo", "models/threshold/activate",
     "models/threshold/rollback", "logout"],
)  # fmt: skip
def test_a_form_without_its_sessions_token_does_nothing(admin: Browser, api: ApiHarness, path: str) -> None:
    job_id = api.enqueue()
    for token in ({}, {"form_token": "0" * 64}):
        response = admin.post(path.format(job=job_id), version="1.0.0", **token)
        assert response.status_code == 403
        assert "FORM_EXPIRED" in response.text


def test_a_role_that_is_too_low_is_told_so_on_a_page(operator: Browser, api: ApiHarness) -> None:
    api.install(activate=False)
    response = operator.post("models/threshold/activate", version="1.0.0", form_token=operator.token())
    assert response.status_code == 403
    assert "ROLE_TOO_LOW" in response.text
    assert api.registry.active_version("threshold") is None


def test_a_refused_job_shows_its_code_sentence_and_remedy_escaped_and_can_be_retried(
    operator: Browser, api: ApiHarness
) -> None:
    job_id = api.enqueue(instances=[api.receive_instance()])
    job = api.claim(job_id)
    with api.records.write() as session:
        refuse_job(
            session,
            job_id,
            job.attempt,
            code="GANTRY_TILT",
            reason=HOSTILE,
            remedy="Send it again.",
            now=api.now,
        )
    for page in (
        operator.get("queue").text,
        operator.get(f"jobs/{job_id}").text,
        operator.get("studies").text,
    ):
        assert "GANTRY_TILT" in page
        assert HOSTILE not in page
        assert "&lt;script&gt;" in page
    assert "Send it again." in operator.get(f"jobs/{job_id}").text
    response = operator.post(f"jobs/{job_id}/retry", form_token=operator.token())
    assert response.headers["location"].startswith(f"/console/jobs/{job_id}?said=")
    with api.records.read() as session:
        assert session.get_one(Job, job_id).state is JobState.QUEUED


def test_a_study_shows_its_jobs_series_and_deliveries(operator: Browser, api: ApiHarness) -> None:
    job_id = api.enqueue(instances=[api.receive_instance()])
    api.succeed(job_id)
    page = operator.get(f"studies/{STUDY}").text
    for expected in (STUDY, job_id[:8], "MR", "PACS", "succeeded", "Deliveries"):
        assert expected in page
    assert "SECRET-PATIENT" not in page + operator.get("studies").text + operator.get(f"jobs/{job_id}").text
    assert operator.get("studies/1.2.3").status_code == 404
    assert "There is no study 1.2.3" in operator.get("studies/1.2.3").text


def test_what_is_read_of_a_patient_on_the_page_is_audited_and_the_lists_are_not(
    admin: Browser, api: ApiHarness
) -> None:
    job_id = api.enqueue(instances=[api.receive_instance()])
    picture = api.succeed(job_id, preview=True)[ResultKind.PREVIEW]
    for path in ("queue", "queue", "studies", "deliveries", "models", "destinations"):
        assert admin.get(path).status_code == 200
    for _ in range(2):  # again within the hour: no further line
        assert admin.get(f"studies/{STUDY}").status_code == 200
        assert admin.get(f"jobs/{job_id}").status_code == 200
        assert admin.get(f"jobs/{job_id}/preview.png").content == picture
        assert admin.get("audit").status_code == 200
    assert admin.get("studies/1.2.3").status_code == 404  # nothing was read
    with api.records.read() as session:
        rows = session.scalars(select(Event).order_by(Event.chain_index)).all()
    told = [(row.kind, row.actor, row.origin, row.subject) for row in rows if row.kind.endswith(".read")]
    assert told == [
        ("study.read", "admin", "127.0.0.1", STUDY),
        ("job.read", "admin", "127.0.0.1", job_id),
        ("result.read", "admin", "127.0.0.1", job_id),
        ("audit.read", "admin", "127.0.0.1", ""),
    ]


def test_a_page_that_a_role_may_not_see_is_audited_with_who_asked(operator: Browser, api: ApiHarness) -> None:
    assert operator.get("audit").status_code == 403
    told = [(row.actor, row.detail["operation"]) for row in events(api, "access.refused")]
    assert told == [("operator", "list_events")]


def test_what_cannot_be_recorded_is_not_shown(admin: Browser, api: ApiHarness) -> None:
    job_id = api.enqueue(instances=[api.receive_instance()])
    picture = api.succeed(job_id, preview=True)[ResultKind.PREVIEW]
    with api.records.write() as session:
        session.execute(text("ALTER TABLE event RENAME TO gone"))
    for path in (f"studies/{STUDY}", f"jobs/{job_id}", f"jobs/{job_id}/preview.png"):
        response = admin.get(path)
        assert response.status_code >= 500, path
        assert STUDY not in response.text
        assert picture not in response.content


def test_a_parked_delivery_is_retried_from_the_page(operator: Browser, api: ApiHarness) -> None:
    job_id = api.enqueue(instances=[api.receive_instance()], destinations=["pacs"])
    api.succeed(job_id)
    with api.records.write() as session:
        delivery = session.scalars(select(Delivery)).first()
        assert delivery is not None
        delivery.state, delivery.last_status, delivery_id = DeliveryState.PARKED, 0x0122, delivery.delivery_id
    page = operator.get("deliveries?of=parked").text
    assert "0x0122" in page
    assert f"deliveries/{delivery_id}/retry" in page
    operator.post(f"deliveries/{delivery_id}/retry", form_token=operator.token())
    with api.records.read() as session:
        assert session.get_one(Delivery, delivery_id).state is DeliveryState.PENDING


def test_a_model_is_swapped_and_taken_back_and_changed_labels_take_a_confirmation(
    admin: Browser, api: ApiHarness
) -> None:
    api.install()
    api.install(activate=False, version="2.0.0", labels=("low", "other"))
    token = admin.token()
    asked = admin.post("models/threshold/activate", version="2.0.0", form_token=token)
    assert asked.status_code == 409
    assert 'name="accept_changed_labels" value="true"' in asked.text
    assert api.registry.active_version("threshold") == "1.0.0"
    admin.post("models/threshold/activate", version="2.0.0", form_token=token, accept_changed_labels="true")
    assert api.registry.active_version("threshold") == "2.0.0"
    assert [e.actor for e in events(api, "model.activated")] == ["admin"]
    admin.post("models/threshold/rollback", form_token=token)
    assert api.registry.active_version("threshold") == "1.0.0"
    assert "model.rolled_back" in admin.get("audit").text


def test_an_active_version_that_cannot_be_used_is_shown_with_its_fault(
    admin: Browser, api: ApiHarness
) -> None:
    api.install()
    assert "cannot be used" not in admin.get("models").text
    (api.registry.root / "threshold" / "1.0.0" / "card.md").write_text("changed")
    page = admin.get("models").text
    assert re.search(r">active</span>\s*<span class=\"state failed\">cannot be used</span>", page)
    assert "card.md" in page
    assert "adding the same bundle again repairs it" in page


def test_gate_and_shadow_mode_are_begun_from_the_page_and_seen_there(admin: Browser, api: ApiHarness) -> None:
    api.install()
    api.install(activate=False, version="1.1.0")
    token = admin.token()
    assert "not run" in admin.get("models").text
    admin.post("models/threshold/1.1.0/gate", form_token=token)
    page = admin.get("models").text
    assert '<span class="state queued">' in page
    admin.post("models/threshold/1.1.0/shadow", form_token=token)
    page = admin.get("models").text
    assert "Shadow mode: 1.1.0, running" in page
    assert "No study was compared yet." in page

    sentence = "low has Dice 0.2500 in <the case>, 1.0000 before."
    figures = {"dice": 0.25, "candidate_ml": 3.0, "active_ml": 4.5, "difference_ml": -1.5}
    job_id = api.enqueue()
    with api.records.write() as session:
        gate = claim_gate(session, owner="w", lease_s=60, now=api.now + timedelta(minutes=1))
        assert gate is not None
        report = {"checks": [{"name": "dice", "passed": False, "sentence": sentence}]}
        finish_gate(
            session, gate.gate_id, gate.attempt, passed=False, against_version="1.0.0", against_digest=None,
            report=report, now=api.now,
        )  # fmt: skip
        shadow = session.scalars(select(Shadow)).one()
        session.add(
            Comparison(
                shadow_id=shadow.shadow_id, job_id=job_id, state=ComparisonState.DONE,
                labels={"low": figures}, created_at=api.now,
            )
        )  # fmt: skip
    page = admin.get("models").text
    assert '<span class="state failed">failed</span>' in page
    assert "1 checks against 1.0.0" in page
    assert "failed: low has Dice 0.2500 in &lt;the case&gt;, 1.0000 before." in page
    assert (
        '<th scope="row">low</th><td>1</td><td>0.2500</td><td>0.2500</td><td>-1.50</td><td>-1.50</td>' in page
    )

    admin.post("models/threshold/shadow/stop", form_token=token)
    assert "Shadow mode: 1.1.0, ended" in admin.get("models").text


def test_a_version_that_has_not_passed_the_gate_is_not_swapped_and_the_page_says_why(
    tmp_path: Path, records: Records
) -> None:
    storage = {"low_watermark_bytes": 0, "reserve_bytes": 0}
    with capture_logs():
        api = ApiHarness(tmp_path, records, storage=storage)
        build_console(api.app, api.app.state.api)
        browser = Browser(api)
        browser.log_in("admin")
        api.install()
        api.install(activate=False, version="1.1.0")
        answer = browser.post("models/threshold/activate", version="1.1.0", form_token=browser.token())
        assert answer.status_code == 409
        assert "GATE_NOT_PASSED" in answer.text
        assert api.registry.active_version("threshold") == "1.0.0"


def test_an_address_that_the_page_does_not_make_is_told_on_a_page(operator: Browser) -> None:
    response = operator.get("queue?of=nonsense")
    assert response.status_code == 422
    assert "INVALID_REQUEST" in response.text
    assert response.headers["content-type"].startswith("text/html")


def test_no_page_runs_a_script_or_loads_from_elsewhere(admin: Browser) -> None:
    for path, _, _ in MENU:
        page = admin.get(path)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src" not in policy
        assert "<script" not in page.text
        assert not re.findall(r'(?:src|href|action)="(?!/console|data:,|#)', page.text)
    assert admin.get("console.css").headers["content-type"].startswith("text/css")


@pytest.mark.parametrize(
    "path",
    ["//evil.example/console/", "https://evil.example/console/queue", "/console/../api", "/elsewhere", "",
     "/console\\evil", "javascript:alert(1)"],
)  # fmt: skip
def test_after_the_login_nobody_is_sent_elsewhere(path: str) -> None:
    assert safe_next(path) == "/console/queue"
    assert safe_next("/console/studies") == "/console/studies"


def test_two_processes_of_a_node_share_the_sessions(operator: Browser, api: ApiHarness) -> None:
    with capture_logs():
        other = ApiHarness.__new__(ApiHarness)
        other.__dict__ = dict(api.__dict__)
        other.app = create_app(api.settings, api.records, api.spool, api.registry, clock=lambda: api.now)
    build_console(other.app, other.app.state.api)
    elsewhere = Browser(other)
    elsewhere.cookie = operator.cookie
    assert elsewhere.get("queue").status_code == 200
    assert not (api.settings.data_dir / "console.secret").exists()


@pytest.mark.parametrize("address", ["/", "/console", "/console/"])
def test_what_people_type_leads_to_the_queue(browser: Browser, address: str) -> None:
    answer = browser.api.get(address, key=None)
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/queue")
