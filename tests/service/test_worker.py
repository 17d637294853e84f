"""Jobs under a worker whose inference process goes through everything that such processes do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import scripted_child
from small_node import SmallNode, make_node
from sqlalchemy import select, update
from waiting import wait_until

from service import inference
from service import worker as worker_module
from service.errors import StorageFullError
from service.lease import LeaseOwner, is_proven_dead
from service.records.database import utc_now
from service.records.fleet import beat
from service.records.fleet_tables import JobNeed
from service.records.jobs import claim_job, enqueue
from service.records.leases import reap_lapsed_jobs
from service.records.tables import Delivery, Event, Job, JobOrigin, JobState, Result
from service.records.work import NewInput, NewJob
from service.settings import WorkerSettings
from service.worker import Worker

NEVER = threading.Event()


class Scene:
    """A node with a model, a queue that tests fill, and a scripted inference process."""

    def __init__(self, folder: Path, script_folder: Path) -> None:
        self.node: SmallNode = make_node(folder)
        self.folder = folder
        self.script_folder = script_folder
        self.digest = self.node.registry.active("threshold").digest
        self._worker: Worker | None = None

    def script(self, *acts: str, **worker: object) -> Worker:
        """Say what happens to each job in turn, and with which settings; the worker."""
        self.script_folder.mkdir(exist_ok=True)
        (self.script_folder / "script.json").write_text(json.dumps(acts))
        settings = self.node.settings.worker.model_dump() | worker
        changed = self.node.settings.model_copy(update={"worker": WorkerSettings(**settings)})
        self.node = replace(self.node, settings=changed)
        self._worker = self.node.worker()
        return self._worker

    def enqueue(self, key: str = "a", **changes: Any) -> str:
        """Put a job into the queue; its identifier."""
        new = NewJob(JobOrigin.UPLOAD, "threshold", key, [NewInput("uploads/x.nii")], destinations=["PACS"])
        with self.node.records.write() as session:
            return enqueue(session, replace(new, **changes), at=utc_now())[0].job_id

    def run(self, *, times: int = 1, stop: threading.Event = NEVER) -> Job:
        """Have the worker take as many claims; the job of the last, as it is then."""
        assert self._worker is not None
        for _ in range(times):
            assert self._worker.run_one(stop)
        return max(self.node.jobs(), key=lambda job: job.started_at or job.created_at)

    def limit(self, worker: Worker, **limits: object) -> None:
        """Set limits of time, once a process is up: what its start takes is the machine's affair.

        The script's first act must be "succeed".
        """
        self.enqueue("to have a process")
        assert self.run().state is JobState.SUCCEEDED
        worker.runner._worker = worker.runner._worker.model_copy(update=limits)

    def given(self, number: int) -> dict[str, Any]:
        """What the inference process was given for the job of this number, once it was."""
        path = self.script_folder / f"{number}.given"
        wait_until(path.exists, 60)
        return json.loads(path.read_text())

    def events(self) -> list[tuple[str, bool]]:
        with self.node.records.read() as session:
            return [(e.kind, e.alert) for e in session.scalars(select(Event).order_by(Event.event_id))]

    def results(self) -> list[Result]:
        with self.node.records.read() as session:
            return list(session.scalars(select(Result)))

    def left_over(self) -> list[Path]:
        """Every file among the results that no row speaks of."""
        known = {result.path for result in self.results()}
        spool = self.node.spool
        files = (path for path in spool.results_dir.rglob("*") if path.is_file())
        return [path for path in files if spool.relative(path) not in known]

    def close(self) -> None:
        if self._worker is not None:
            self._worker.runner.close()
        self.node.records.close()


@pytest.fixture(scope="module")
def node_with_a_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a node that has never worked, to be copied."""
    folder = tmp_path_factory.mktemp("template")
    node = make_node(folder / "node")
    node.add_model(folder / "bundle")
    node.records.close()
    return folder / "node"


@pytest.fixture
def scene(tmp_path: Path, node_with_a_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    shutil.copytree(node_with_a_model, tmp_path / "node")
    made = Scene(tmp_path / "node", tmp_path / "script")
    command = (sys.executable, scripted_child.__file__, str(made.script_folder))
    monkeypatch.setattr(inference, "COMMAND", command)
    yield made
    made.close()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_job_that_succeeds_has_results_deliveries_and_the_digest_it_ran_on(scene: Scene) -> None:
    worker = scene.script("succeed")
    scene.enqueue()
    job = scene.run()
    assert (job.state, job.attempt, job.model_version, job.model_digest) == (
        JobState.SUCCEEDED,
        1,
        "1.0.0",
        scene.digest,
    )
    assert (job.runtime, job.precision, job.summary) == ("scripted", "float32", {"found": 1})
    assert sorted(result.kind for result in scene.results()) == ["measurements", "segmentation"]
    for result in scene.results():
        assert scene.node.spool.absolute(result.path).stat().st_size == result.size_bytes
        assert result.path.startswith(f"results/{job.job_id}/1/")
    with scene.node.records.read() as session:
        assert len(session.scalars(select(Delivery)).all()) == 1
    assert scene.events() == [("job.succeeded", False)]
    assert scene.given(0)["digest"] == scene.digest
    assert not worker.run_one(NEVER)


def test_a_refusal_is_final_and_the_process_goes_on_to_the_next_job(scene: Scene) -> None:
    scene.script("refuse", "succeed")
    scene.enqueue("a")
    scene.enqueue("b")
    refused = scene.run()
    assert (refused.state, refused.reason_code) == (JobState.REFUSED, "GANTRY_TILT")
    assert (refused.reason, refused.remedy) == ("Tilted by 18.5 degrees.", "Straighten it.")
    assert scene.run().state is JobState.SUCCEEDED
    assert scene.given(0)["pid"] == scene.given(1)["pid"]


def test_what_is_too_large_here_is_left_to_a_larger_worker_or_refused_where_there_is_none(
    scene: Scene,
) -> None:
    scene.script("refuse TOO_LARGE", "refuse TOO_LARGE", memory_bytes=2**30)
    scene.enqueue("a")
    refused = scene.run()
    assert (refused.state, refused.reason_code) == (JobState.REFUSED, "TOO_LARGE")
    with scene.node.records.write() as session:
        for owner, models in (("of another model", ["other"]), ("larger", [])):
            kind = {"host": "host", "models": models, "memory_bytes": 2**40, "bell_heard_at": None}
            beat(session, owner=owner, now=utc_now(), **kind)
    scene.enqueue("b")
    left = scene.run()
    assert (left.state, left.reason_code) == (JobState.QUEUED, "OUT_OF_MEMORY")
    with scene.node.records.read() as session:
        assert session.get_one(JobNeed, left.job_id).more_than_bytes == 2**30


def test_a_failure_is_tried_again_later_in_a_fresh_process_and_the_last_one_is_final(scene: Scene) -> None:
    worker = scene.script("fail again", "fail again", "fail again", first_retry_s=1000.0)
    scene.enqueue()
    job = scene.run()
    assert (job.state, job.failures, job.reason_code) == (JobState.QUEUED, 1, "BROKEN")
    assert job.not_before is not None
    assert timedelta(seconds=900) < job.not_before - utc_now() < timedelta(seconds=1000)
    assert not worker.run_one(NEVER)  # not yet

    def now() -> None:
        with scene.node.records.write() as session:
            session.execute(update(Job).values(not_before=None))

    now()
    job = scene.run()
    assert job.not_before is not None
    assert job.not_before - utc_now() > timedelta(seconds=3900)  # four times as long
    now()
    job = scene.run()
    assert (job.state, job.failures, job.lapses, job.attempt) == (JobState.FAILED, 3, 0, 3)
    assert scene.events() == [("job.attempt_failed", False)] * 2 + [("job.failed", True)]
    assert len({scene.given(i)["pid"] for i in range(3)}) == 3


def test_what_trying_again_cannot_help_fails_at_once(scene: Scene) -> None:
    scene.script("fail never")
    scene.enqueue()
    assert scene.run().state is JobState.FAILED
    assert scene.events() == [("job.failed", True)]


@pytest.mark.parametrize(
    ("act", "code", "sentence"),
    [
        ("die SIGKILL", "OUT_OF_MEMORY", "most probably because memory ran out"),
        ("die SIGSEGV", "CHILD_DIED", "signal 11 (SIGSEGV)"),
        ("exit 0", "CHILD_DIED", "exit status 0"),
        ("exit 3", "CHILD_DIED", "exit status 3"),
        ("babble", "PROTOCOL", "none of its own"),
        ("of_another_attempt", "PROTOCOL", "another attempt"),
        ("of_another_job", "PROTOCOL", "another attempt"),
        ("without_files", "PROTOCOL", "is not there"),
    ],
)
def test_whatever_becomes_of_the_process_is_a_failure_with_a_sentence_and_the_job_is_tried_again(
    scene: Scene, act: str, code: str, sentence: str
) -> None:
    scene.script(act, "succeed")
    scene.enqueue()
    job = scene.run()
    assert (job.state, job.failures, job.lapses, job.reason_code) == (JobState.QUEUED, 1, 0, code)
    assert sentence in (job.reason or "")
    assert job.remedy
    assert scene.results() == []
    assert scene.left_over() == []
    assert not is_running(scene.given(0)["pid"])
    job = scene.run()
    assert (job.state, job.reason_code, job.attempt) == (JobState.SUCCEEDED, None, 2)
    assert all(f"/{job.job_id}/2/" in result.path for result in scene.results())
    assert scene.left_over() == []


@pytest.mark.parametrize(
    ("act", "settings", "code"),
    [
        ("hang", {"stall_timeout_s": 2.0}, "CHILD_STALLED"),
        ("repeat", {"stall_timeout_s": 2.0}, "CHILD_STALLED"),
        ("crawl", {"job_deadline_s": 2.0}, "DEADLINE_EXCEEDED"),
    ],
)
def test_a_process_that_gets_nowhere_is_killed(scene: Scene, act: str, settings: dict, code: str) -> None:
    scene.limit(scene.script("succeed", act), **settings)
    scene.enqueue()
    job = scene.run()
    assert (job.state, job.failures, job.reason_code) == (JobState.QUEUED, 1, code)
    assert "forward" in (job.reason or "")
    assert not is_running(scene.given(1)["pid"])


def test_a_process_that_does_not_even_start_is_killed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "COMMAND", (sys.executable, "-c", "import time; time.sleep(600)"))
    worker = scene.script("succeed", stall_timeout_s=0.6)
    scene.enqueue()
    job = scene.run()
    assert (job.state, job.failures, job.reason_code) == (JobState.QUEUED, 1, "CHILD_STALLED")
    assert worker.runner.inference_pid is None


def test_an_error_of_the_worker_itself_leaves_no_process_at_work(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = scene.script("succeed", "crawl", "succeed")
    scene.limit(worker, lease_s=2.0)
    scene.enqueue()

    def renew(*_arguments: object) -> None:
        raise RuntimeError("a mistake")

    with monkeypatch.context() as during:
        during.setattr(worker.runner, "_renew", renew)
        with pytest.raises(RuntimeError, match="a mistake"):
            worker.run_one(NEVER)
    assert not is_running(scene.given(1)["pid"])
    assert worker.reap(utc_now() + timedelta(hours=1)) != []  # the lease was not renewed, and lapses
    job = scene.run()
    assert (job.state, job.lapses, job.failures) == (JobState.SUCCEEDED, 1, 0)


def test_a_job_that_always_takes_all_memory_is_neither_lost_nor_run_for_ever(scene: Scene) -> None:
    tries = scene.node.settings.worker.maximum_failures
    scene.script(*["die SIGKILL"] * tries, "succeed")
    scene.enqueue()
    job = scene.run(times=tries)
    assert (job.state, job.attempt, job.reason_code) == (JobState.FAILED, tries, "OUT_OF_MEMORY")
    assert ("job.failed", True) in scene.events()
    other = scene.enqueue("b")  # whatever it was, the next job has a process of its own
    assert scene.run().job_id == other
    assert {each.job_id: each.state for each in scene.node.jobs()}[other] is JobState.SUCCEEDED


def test_a_model_that_cannot_be_loaded_fails_the_job(scene: Scene) -> None:
    scene.script("cannot_load")
    scene.enqueue()
    job = scene.run()
    assert (job.state, job.reason_code) == (JobState.FAILED, "MODEL_UNSUPPORTED")


class TestModels:
    def test_an_unknown_model_is_a_refusal(self, scene: Scene) -> None:
        scene.script("succeed")
        scene.enqueue(model_name="nobody")
        job = scene.run()
        assert (job.state, job.reason_code) == (JobState.REFUSED, "MODEL_UNKNOWN")
        assert job.remedy

    def test_so_is_an_unknown_version(self, scene: Scene) -> None:
        scene.script("succeed")
        scene.enqueue(requested_version="9.9.9")
        assert scene.run().reason_code == "MODEL_UNKNOWN"

    @pytest.mark.parametrize("requested", [None, "1.0.0"])
    def test_a_withdrawn_version_starts_no_job(self, scene: Scene, requested: str | None) -> None:
        scene.script("succeed")
        scene.enqueue(requested_version=requested)
        scene.node.registry.withdraw("threshold", "1.0.0")
        job = scene.run()
        assert (job.state, job.reason_code) == (JobState.REFUSED, "MODEL_WITHDRAWN")
        assert not list(scene.script_folder.glob("*.given"))

    def test_each_job_runs_on_the_digest_that_is_active_when_it_starts(self, scene: Scene) -> None:
        scene.script("succeed", "succeed", "succeed")
        first = scene.enqueue("a")
        second = scene.enqueue("b")
        third = scene.enqueue("c", requested_version="1.0.0")
        scene.run()
        newer = scene.node.add_model(scene.folder / "newer", version="1.1.0")
        scene.run(times=2)
        jobs = {job.job_id: (job.model_digest, job.model_version) for job in scene.node.jobs()}
        assert jobs == {
            first: (scene.digest, "1.0.0"),
            second: (newer, "1.1.0"),
            third: (scene.digest, "1.0.0"),
        }
        given = [scene.given(i) for i in range(3)]
        assert [g["digest"] for g in given] == [scene.digest, newer, scene.digest]
        assert len({g["pid"] for g in given}) == 3

    def test_a_bundle_that_was_altered_on_the_disk_runs_nothing(self, scene: Scene) -> None:
        scene.script("succeed")
        scene.enqueue()
        weights = scene.node.registry.active("threshold").folder / "student.onnx"
        weights.chmod(0o644)
        weights.write_bytes(weights.read_bytes() + b"\0")
        job = scene.run()
        assert job.state is JobState.FAILED
        assert not list(scene.script_folder.glob("*.given"))


def test_the_process_is_replaced_after_so_many_jobs(scene: Scene) -> None:
    scene.script(*["succeed"] * 5, jobs_per_child=2)
    for i in range(5):
        scene.enqueue(str(i))
    scene.run(times=5)
    pids = [scene.given(i)["pid"] for i in range(5)]
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]
    assert not is_running(pids[0])


class TestClaims:
    """What happens to the job in the records while its attempt is under way."""

    def running(self, scene: Scene, act: str, meanwhile: Callable[[int], None], **settings: object) -> Job:
        """Run one job, and do something once its process has it."""
        scene.script(act, **{"lease_s": 3.0, **settings})
        scene.enqueue()
        errors: list[BaseException] = []

        def act_on_it() -> None:
            try:
                meanwhile(scene.given(0)["pid"])
            except BaseException as error:  # noqa: BLE001  # raised again below
                errors.append(error)

        thread = threading.Thread(target=act_on_it)
        thread.start()
        job = scene.run()
        thread.join()
        if errors:
            raise errors[0]
        return job

    def test_a_job_that_is_cancelled_is_left_and_nothing_of_it_stays(self, scene: Scene) -> None:
        def cancel(_pid: int) -> None:
            with scene.node.records.write() as session:
                session.execute(update(Job).values(state=JobState.CANCELLED))

        job = self.running(scene, "crawl", cancel)
        assert job.state is JobState.CANCELLED
        assert scene.results() == scene.left_over() == []
        assert not is_running(scene.given(0)["pid"])

    def test_results_of_an_attempt_that_lost_its_claim_are_thrown_away(self, scene: Scene) -> None:
        def take_over(_pid: int) -> None:
            later = utc_now() + timedelta(hours=1)
            with scene.node.records.write() as session:
                assert len(reap_lapsed_jobs(session, maximum_lapses=10, now=later)) == 1
                assert claim_job(session, owner="another", lease_s=60, now=later) is not None

        job = self.running(scene, "succeed_after 0.3", take_over, lease_s=60.0)
        assert (job.state, job.attempt, job.lease_owner) == (JobState.RUNNING, 2, "another")
        assert scene.results() == scene.left_over() == []

    def test_the_lease_is_kept_while_the_process_makes_progress(self, scene: Scene) -> None:
        def look() -> list[str]:
            with scene.node.records.write() as session:
                return reap_lapsed_jobs(session, maximum_lapses=10, now=utc_now())

        def keep_looking(_pid: int) -> None:
            def ended_or_lapsed() -> bool:
                assert look() == []
                return scene.node.jobs()[0].state is not JobState.RUNNING

            wait_until(ended_or_lapsed, 60)

        job = self.running(scene, "succeed_after 4.0", keep_looking)
        assert (job.state, job.lapses, job.attempt) == (JobState.SUCCEEDED, 0, 1)

    def test_progress_is_seen_in_the_records(self, scene: Scene) -> None:
        def look(_pid: int) -> None:
            wait_until(lambda: scene.node.jobs()[0].progress_fraction >= 0.25, 60)
            assert scene.node.jobs()[0].progress_stage == "forward"

        self.running(scene, "succeed_after 2.0", look)

    def test_a_worker_that_stops_gives_its_job_back_unharmed(self, scene: Scene) -> None:
        stop = threading.Event()
        scene.script("hang", "succeed")
        scene.enqueue()
        threading.Thread(target=lambda: (scene.given(0), stop.set())).start()
        job = scene.run(stop=stop)
        assert (job.state, job.failures, job.lapses, job.lease_owner) == (JobState.QUEUED, 0, 0, None)
        assert not is_running(scene.given(0)["pid"])
        assert scene.run().state is JobState.SUCCEEDED


class TestReaping:
    def claim_as(self, scene: Scene, owner: str) -> str:
        job_id = scene.enqueue(owner)
        with scene.node.records.write() as session:
            assert claim_job(session, owner=owner, lease_s=3600, now=utc_now()) is not None
        return job_id

    def dead_owner(self) -> LeaseOwner:
        process = subprocess.Popen([sys.executable, "-c", "pass"])
        process.wait()
        return replace(LeaseOwner.of_this_process(), pid=process.pid)

    def test_jobs_of_a_process_that_is_proven_dead_are_taken_back_at_once(self, scene: Scene) -> None:
        job_id = self.claim_as(scene, str(self.dead_owner()))
        self.claim_as(scene, str(LeaseOwner.of_this_process()))
        assert scene.script("succeed").reap(utc_now()) == [job_id]
        job, other = scene.node.jobs()
        assert (other.state, other.lapses) == (JobState.RUNNING, 0)
        assert (job.state, job.lapses, job.failures) == (JobState.QUEUED, 1, 0)
        assert scene.events() == [("job.lapsed", False)]
        assert scene.run().state is JobState.SUCCEEDED

    def test_jobs_of_others_are_waited_for(self, scene: Scene) -> None:
        dead, alive = self.dead_owner(), LeaseOwner.of_this_process()
        owners = [
            str(alive),
            str(replace(dead, space="another boot:4026531836")),
            str(replace(dead, space="-")),
            str(replace(dead, started="-")),
            "celery@host",
            "a/b/c/d",
        ]
        for owner in owners:
            self.claim_as(scene, owner)
        worker = scene.script("succeed")
        assert worker.reap(utc_now()) == []
        assert len(worker.reap(utc_now() + timedelta(hours=2))) == len(owners)

    def test_a_process_identifier_that_was_given_away_again_is_no_proof_of_life(self) -> None:
        reused = replace(LeaseOwner.of_this_process(), started="1")
        assert is_proven_dead(str(reused))

    def test_a_job_whose_workers_always_die_fails_with_an_alert(self, scene: Scene) -> None:
        worker = scene.script("succeed", maximum_lapses=2)
        job_id = self.claim_as(scene, str(self.dead_owner()))
        worker.reap(utc_now())
        with scene.node.records.write() as session:
            claim_job(session, owner=str(self.dead_owner()), lease_s=3600, now=utc_now())
        assert worker.reap(utc_now()) == [job_id]
        (job,) = scene.node.jobs()
        assert (job.state, job.reason_code, job.failures) == (JobState.FAILED, "WORKER_LOST", 0)
        assert scene.events() == [("job.lapsed", False), ("job.failed", True)]


def test_no_job_is_started_while_its_results_would_eat_into_the_reserve(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = scene.script("succeed")
    scene.enqueue()
    full = StorageFullError("The spool's disk has 1 byte free.")

    def check_reserve(needed_bytes: int = 0) -> None:
        raise full

    with monkeypatch.context() as during:
        during.setattr(scene.node.spool, "check_reserve", check_reserve)
        assert not worker.run_one(NEVER)
        assert not worker.run_one(NEVER)
    assert scene.events() == [("worker.disk_full", True)]
    assert scene.node.jobs()[0].state is JobState.QUEUED
    assert scene.run().state is JobState.SUCCEEDED


def test_an_error_that_nobody_foresaw_ends_none_of_the_loops(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(worker_module, "_PAUSE_AFTER_ERROR_S", 0.01)
    worker = scene.script("succeed")
    failed: set[str] = set()

    def failing_once(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if name not in failed:
                failed.add(name)
                raise RuntimeError(name)
            return real(*arguments)

        return call

    for owner, name in (
        (worker, "run_one"),
        (worker._completeness, "sweep"),
        (worker._deliverer, "run_once"),
    ):
        monkeypatch.setattr(owner, name, failing_once(name, getattr(owner, name)))
    stop = threading.Event()
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    try:
        scene.node.receive_phantom(tmp_path / "s")
        scene.node.wait_for_jobs(JobState.SUCCEEDED)
        attempts = select(Delivery.attempt)

        def delivery_was_tried() -> bool:
            with scene.node.records.read() as session:
                return (session.scalar(attempts) or 0) > 0

        wait_until(delivery_was_tried, 30)
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive()
    assert failed == {"run_one", "sweep", "run_once"}


def test_a_correction_while_the_job_runs_gives_the_result_of_the_corrected_series_alone(
    scene: Scene, tmp_path: Path
) -> None:
    worker = scene.script("hang", "succeed", lease_s=0.6)
    scene.node.receive_phantom(tmp_path / "s", patient_id="WRONG")
    stop = threading.Event()
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    try:
        scene.given(0)
        scene.node.receive_phantom(tmp_path / "t", patient_id="RIGHT")
        scene.node.wait_for_jobs(JobState.CANCELLED, JobState.SUCCEEDED)
    finally:
        stop.set()
        thread.join(30)
    right, wrong = scene.given(1)["job"]["channels"], scene.given(0)["job"]["channels"]
    assert len(right[0]) == len(wrong[0]) == 8
    assert not {*right[0]} & {*wrong[0]}
    assert len(scene.results()) == 2
