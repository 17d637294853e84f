"""Storage commitment: only the destination's own report makes a delivery committed, wherever it comes in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from api_harness import ApiHarness
from pydicom.dataset import Dataset
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import StorageCommitmentPushModel
from sqlalchemy import select
from waiting import wait_until

from service.commitment import Committer, ReportDesk
from service.dicom.commitment import NO_SUCH_OBJECT, CommitmentReport, read_report
from service.dicom.incoming import close_connection
from service.dicom.receive import Receiver
from service.records.database import Records, utc_now
from service.records.deliveries import claim_delivery, mark_sent, retry_delivery
from service.records.governance_tables import Commitment
from service.records.tables import Delivery, DeliveryState, Event


class CommittingScp:
    """A PACS that takes N-ACTION requests; whether, where and what it reports, it is told.

    ``report_on`` is "same" for the association of the request, "another" for one of its own to
    ``node_port``, and "" for never. ``lost`` and ``refused`` are the objects that it does not confirm.
    """

    def __init__(self, *, report_on: str = "same", status: int = 0x0000) -> None:
        self.report_on, self.status = report_on, status
        self.node_port = 0
        self.lost: set[str] = set()
        self.refused: set[str] = set()
        self.requests: list[Dataset] = []
        self.answers: list[int] = []
        self._entity = AE(ae_title="PACS")
        self._entity.add_supported_context(StorageCommitmentPushModel)
        self._server: Any = None
        self._reporters: list[threading.Thread] = []

    def __enter__(self) -> CommittingScp:
        handlers = [(evt.EVT_N_ACTION, self._on_action), (evt.EVT_CONN_CLOSE, close_connection)]
        self._server = self._entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        return self

    def __exit__(self, *_: object) -> None:
        for reporter in self._reporters:
            reporter.join(10)
        self._entity.shutdown()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def _on_action(self, event: Any) -> tuple[int, None]:
        self.requests.append(event.action_information)
        if self.status == 0x0000 and self.report_on:
            target = self._report_here if self.report_on == "same" else self._report_there
            reporter = threading.Thread(target=target, args=(event.assoc, event.action_information))
            self._reporters.append(reporter)
            reporter.start()
        return self.status, None

    def _report_here(self, association: Any, request: Dataset) -> None:
        event_type, report = self.report_of(request)
        status, _ = association.send_n_event_report(
            report, event_type, StorageCommitmentPushModel, "1.2.840.10008.1.20.1.1"
        )
        self.answers.append(status.Status)

    def _report_there(self, _association: object, request: Dataset) -> None:
        self.answers.append(self.report_to(self.node_port, *self.report_of(request)))

    def report_to(self, port: int, event_type: int, report: Dataset) -> int:
        """Report on an association of its own, as the SCP of the service that it is."""
        entity = AE(ae_title="PACS")
        entity.add_requested_context(StorageCommitmentPushModel)
        association = entity.associate(
            "127.0.0.1",
            port,
            ae_title="SEGNODE",
            ext_neg=[build_role(StorageCommitmentPushModel, scu_role=False, scp_role=True)],
        )
        assert association.is_established
        status, _ = association.send_n_event_report(
            report, event_type, StorageCommitmentPushModel, "1.2.840.10008.1.20.1.1"
        )
        association.release()
        return int(status.Status)

    def report_of(self, request: Dataset) -> tuple[int, Dataset]:
        report = Dataset()
        report.TransactionUID = request.TransactionUID
        stored, failed = [], []
        for reference in request.ReferencedSOPSequence:
            uid = reference.ReferencedSOPInstanceUID
            if uid in self.lost | self.refused:
                reference.FailureReason = NO_SUCH_OBJECT if uid in self.lost else 0x0213
                failed.append(reference)
            else:
                stored.append(reference)
        if stored:
            report.ReferencedSOPSequence = stored
        if failed:
            report.FailedSOPSequence = failed
        return (2 if failed else 1), report


class Scene:
    """A node with results that were sent to a PACS which is asked to confirm them."""

    def __init__(self, api: ApiHarness, pacs: CommittingScp) -> None:
        self.api, self.pacs = api, pacs
        self.committer = Committer(api.settings, api.records)

    def send(self) -> str:
        """A result that has just been sent; its delivery's identifier."""
        job_id = self.api.enqueue(destinations=["pacs"])
        self.api.succeed(job_id)
        with self.api.records.read() as session:
            return session.scalars(select(Delivery.delivery_id).where(Delivery.job_id == job_id)).one()

    def mark_sent(self) -> None:
        now = utc_now()
        with self.api.records.write() as session:
            while (delivery := claim_delivery(session, owner="w", lease_s=60, now=now)) is not None:
                mark_sent(session, delivery.delivery_id, delivery.attempt, status=0, note=None, now=now)

    def sent(self) -> str:
        delivery_id = self.send()
        self.mark_sent()
        return delivery_id

    def state(self, delivery_id: str) -> DeliveryState:
        with self.api.records.read() as session:
            return session.get_one(Delivery, delivery_id).state

    def uid(self, delivery_id: str) -> str:
        with self.api.records.read() as session:
            uid = session.get_one(Delivery, delivery_id).result.sop_instance_uid
            assert uid is not None
            return uid

    def alerts(self) -> list[str]:
        with self.api.records.read() as session:
            return list(session.scalars(select(Event.kind).where(Event.alert).order_by(Event.event_id)))

    def ask(self, *, later_s: float = 0.0) -> bool:
        return self.committer.run_once(utc_now() + timedelta(seconds=later_s))


@pytest.fixture
def make_scene(records: Records, tmp_path: Any) -> Iterator[Callable[..., Scene]]:
    scenes: list[CommittingScp] = []

    def make(*, commitment: dict[str, Any] | None = None, **pacs: Any) -> Scene:
        scp = CommittingScp(**pacs).__enter__()
        scenes.append(scp)
        api = ApiHarness(
            tmp_path,
            records,
            storage={"low_watermark_bytes": 0, "reserve_bytes": 0},
            dicom={"port": 0, "peers": [{"ae_title": "PACS"}]},
            commitment={"listen_s": 30.0} | (commitment or {}),
            destinations=[
                {
                    "name": "pacs",
                    "ae_title": "PACS",
                    "host": "127.0.0.1",
                    "port": scp.port,
                    "timeout_s": 30,
                    "storage_commitment": True,
                }
            ],
        )
        return Scene(api, scp)

    yield make
    for scp in scenes:
        scp.__exit__()


def test_a_report_on_the_same_association_commits(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    deliveries = [scene.sent() for _ in range(3)]
    assert scene.ask()
    wait_until(lambda: scene.pacs.answers == [0x0000], 30)
    assert [scene.state(each) for each in deliveries] == [DeliveryState.COMMITTED] * 3
    assert len(scene.pacs.requests) == 1  # for all that was due at once
    assert not scene.ask(later_s=10_000)


def test_a_report_on_an_association_of_its_own_commits(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(report_on="another", commitment={"listen_s": 0.0})
    receiver = Receiver(scene.api.settings, scene.api.records, scene.api.spool)
    receiver.start()
    try:
        scene.pacs.node_port = receiver.port
        delivery = scene.sent()
        assert scene.ask()
        wait_until(lambda: scene.pacs.answers == [0x0000], 30)
        assert scene.state(delivery) is DeliveryState.COMMITTED
        unknown = Dataset()
        unknown.TransactionUID = "2.25.1"
        assert scene.pacs.report_to(receiver.port, 1, unknown) == 0x0110
    finally:
        receiver.stop()


def test_without_a_report_it_stays_sent_and_is_asked_again_and_parked_at_last(
    make_scene: Callable[..., Scene],
) -> None:
    rules = {"listen_s": 0.0, "report_timeout_s": 100.0, "maximum_requests": 3}
    scene = make_scene(report_on="", commitment=rules)
    delivery = scene.sent()
    for attempt in range(3):
        assert scene.ask(later_s=attempt * 101)
        assert not scene.ask(later_s=attempt * 101 + 50)
        assert scene.state(delivery) is DeliveryState.SENT
    uids = {request.TransactionUID for request in scene.pacs.requests}
    assert len(uids) == 3
    assert scene.ask(later_s=303)
    assert scene.state(delivery) is DeliveryState.PARKED
    assert scene.alerts() == ["delivery_parked"]
    assert len(scene.pacs.requests) == 3
    # A person sends it again: then it is asked for anew.
    with scene.api.records.write() as session:
        retry_delivery(session, delivery, now=utc_now())
    scene.mark_sent()
    assert scene.ask()
    assert len(scene.pacs.requests) == 4


def test_what_the_destination_does_not_have_is_sent_again(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    kept, lost = scene.sent(), scene.sent()
    scene.pacs.lost = {scene.uid(lost)}
    assert scene.ask()
    wait_until(lambda: scene.state(kept) is DeliveryState.COMMITTED, 30)
    assert scene.state(lost) is DeliveryState.PENDING
    assert scene.alerts() == ["delivery_not_kept"]
    scene.pacs.lost = set()
    scene.mark_sent()
    assert scene.ask()
    wait_until(lambda: scene.state(lost) is DeliveryState.COMMITTED, 30)


def test_a_destination_that_loses_it_for_ever_ends_in_a_parked_delivery(
    make_scene: Callable[..., Scene],
) -> None:
    scene = make_scene(commitment={"maximum_requests": 2})
    lost = scene.sent()
    scene.pacs.lost = {scene.uid(lost)}
    for _ in range(2):
        assert scene.ask()
        wait_until(lambda: scene.state(lost) is DeliveryState.PENDING, 30)
        scene.mark_sent()
    assert scene.ask()
    assert scene.state(lost) is DeliveryState.PARKED
    with scene.api.records.read() as session:
        assert "failure reason 0x0112" in (session.get_one(Delivery, lost).last_error or "")


def test_another_reason_is_asked_for_again_later(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(commitment={"first_retry_s": 100.0})
    delivery = scene.sent()
    scene.pacs.refused = {scene.uid(delivery)}
    assert scene.ask()
    wait_until(lambda: scene.pacs.answers == [0x0000], 30)
    assert scene.state(delivery) is DeliveryState.SENT
    assert not scene.ask(later_s=50)
    scene.pacs.refused = set()
    assert scene.ask(later_s=200)
    wait_until(lambda: scene.state(delivery) is DeliveryState.COMMITTED, 30)


def test_a_refused_or_unheard_request_is_made_again_with_back_off(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(status=0x0122, commitment={"first_retry_s": 100.0})
    delivery = scene.sent()
    assert scene.ask()
    assert not scene.ask(later_s=90)
    assert scene.ask(later_s=110)
    assert not scene.ask(later_s=110 + 190)
    with scene.api.records.read() as session:
        row = session.get_one(Commitment, delivery)
        assert (row.requests, row.last_error) == (2, "The peer answered 0x0122.")
    assert scene.state(delivery) is DeliveryState.SENT


def test_nobody_is_asked_who_is_not_configured_so(api: ApiHarness) -> None:
    asked: list[object] = []
    job_id = api.enqueue(destinations=["pacs"])
    api.succeed(job_id)
    committer = Committer(api.settings, api.records, request=lambda *a, **k: asked.append(a))  # type: ignore[arg-type,return-value]
    assert not committer.run_once(utc_now())
    assert asked == []


def test_a_report_changes_nothing_that_it_does_not_name(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(report_on="", commitment={"listen_s": 0.0})
    delivery = scene.sent()
    assert scene.ask()
    desk = ReportDesk(scene.api.records, scene.api.settings.commitment)
    transaction = str(scene.pacs.requests[0].TransactionUID)
    uid = scene.uid(delivery)
    assert not desk.take(CommitmentReport("2.25.77", frozenset({uid})))
    assert scene.state(delivery) is DeliveryState.SENT
    assert desk.take(CommitmentReport(transaction, frozenset({"1.2.3"})))
    assert scene.state(delivery) is DeliveryState.SENT
    for _ in range(2):  # a report that is repeated is taken again
        assert desk.take(CommitmentReport(transaction, frozenset({uid})))
        assert scene.state(delivery) is DeliveryState.COMMITTED


def test_an_object_that_is_stored_and_failed_is_failed() -> None:
    report, reference, failure = Dataset(), Dataset(), Dataset()
    report.TransactionUID = "2.25.5"
    reference.ReferencedSOPInstanceUID = failure.ReferencedSOPInstanceUID = "1.2"
    failure.FailureReason = 0x0112
    report.ReferencedSOPSequence, report.FailedSOPSequence = [reference], [failure]
    read = read_report(2, report)
    assert read is not None
    assert (read.stored, read.failed) == (frozenset(), {"1.2": 0x0112})
    assert read_report(3, report) is None
    assert read_report(1, Dataset()) is None
