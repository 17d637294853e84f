"""The inference process itself, spoken to as the worker speaks to it."""

from __future__ import annotations

import ast
import errno
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from bundle_factory import make_threshold_bundle
from phantom import write_classic_series
from small_node import AFFINE, image_array
from waiting import wait_until

from models.bundle import Bundle
from models.errors import ReasonCode, Refusal
from models.segmenter import Progress, Segmenter
from service import child, inference, pipeline
from service.errors import AttemptError
from service.inference import InferenceProcess
from service.pipeline_job import PipelineJob
from service.protocol import (
    Advance,
    Answer,
    Failed,
    OpenModel,
    Ready,
    Refused,
    RunJob,
    Succeeded,
    parse_answer,
)

CREATED_AT = datetime(2026, 3, 4, 5, 6, 7)  # noqa: DTZ001  # times in the records are naive
PATIENT = "DOE^JANE"
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_threshold_bundle(tmp_path_factory.mktemp("m") / "b", spacing_mm=(2.0, 1.25, 1.5))


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("s")
    return tuple(write_classic_series(folder, image_array(), AFFINE, PatientName=PATIENT))


@pytest.fixture(scope="module")
def process(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceProcess]:
    """One process for the tests that do not hurt it."""
    started = InferenceProcess(opening(bundle, tmp_path_factory.mktemp("cache")))
    assert isinstance(started.next_answer(timeout_s=60), Ready)
    yield started
    started.end()


def opening(bundle: Bundle, cache_dir: Path, **changes: object) -> OpenModel:
    model = OpenModel(
        bundle=bundle.folder, digest=bundle.digest, runtime="onnxruntime", threads=1, cache_dir=cache_dir
    )
    return model.model_copy(update=changes)


def order(out: Path, *channels: tuple[Path, ...], attempt: int = 1) -> RunJob:
    return RunJob(
        job_id="a" * 32,
        attempt=attempt,
        job=PipelineJob(channels, CREATED_AT, out, settings_digest="s"),
    )


def answers(process: InferenceProcess) -> tuple[list[Advance], Answer]:
    """Everything it says about one job."""
    advances: list[Advance] = []
    while isinstance(answer := process.next_answer(timeout_s=60), Advance):
        advances.append(answer)
    return advances, answer


def test_a_process_gives_what_the_pipeline_gives(
    process: InferenceProcess, bundle: Bundle, series: tuple[Path, ...], tmp_path: Path
) -> None:
    process.give(order(tmp_path / "theirs", series))
    advances, answer = answers(process)
    assert isinstance(answer, Succeeded)
    assert {(a.job_id, a.attempt) for a in (*advances, answer)} == {("a" * 32, 1)}
    assert advances[0].stage == "read"
    assert [a.fraction for a in advances] == sorted(a.fraction for a in advances)

    segmenter = Segmenter(bundle, runtime="onnxruntime", threads=1)
    job = PipelineJob((series,), CREATED_AT, tmp_path / "ours", settings_digest="s")
    outcome = pipeline.run(job, segmenter, bundle.manifest, bundle.digest)
    segmenter.close()
    assert [vars(file) for file in outcome.files] == [file.model_dump() for file in answer.files]
    assert outcome.summary == answer.summary
    for file in answer.files:
        assert (tmp_path / "theirs" / file.name).read_bytes() == (tmp_path / "ours" / file.name).read_bytes()


def test_a_refusal_is_passed_on_and_the_process_goes_on(
    process: InferenceProcess, series: tuple[Path, ...], tmp_path: Path
) -> None:
    process.give(order(tmp_path / "a", series[:3] + series[4:]))
    _, answer = answers(process)
    assert isinstance(answer, Refused)
    assert answer.code == "MISSING_SLICE"
    assert answer.remedy
    assert not (tmp_path / "a").exists()
    process.give(order(tmp_path / "b", series))
    assert isinstance(answers(process)[1], Succeeded)


def test_the_process_is_the_first_to_be_killed_when_memory_runs_out(process: InferenceProcess) -> None:
    assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "500\n"


def test_another_model_than_the_one_named_is_not_loaded(bundle: Bundle, tmp_path: Path) -> None:
    started = InferenceProcess(opening(bundle, tmp_path, digest="0" * 64))
    answer = started.next_answer(timeout_s=60)
    started.end()
    assert isinstance(answer, Failed)
    assert (answer.code, answer.job_id) == ("BUNDLE_INVALID", None)


def test_a_process_ends_when_its_worker_does_whatever_it_is_doing(
    bundle: Bundle, series: tuple[Path, ...], tmp_path: Path
) -> None:
    """The worker is another process, killed with SIGKILL in the middle of a job."""
    slow = make_threshold_bundle(tmp_path / "slow", slow_convolutions=60, patch_size=(96, 96, 96))
    worker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _WORKER,
            opening(slow, tmp_path).to_line(),
            order(tmp_path / "o", series).to_line(),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    assert worker.stdout.readline() == "forward\n"
    worker.kill()
    worker.wait()
    worker.stdout.close()
    wait_until(lambda: not _is_running(pid), 20)
    assert not (tmp_path / "o").exists()


_WORKER = """
import sys
from service.inference import InferenceProcess
from service.protocol import *
process = InferenceProcess(OpenModel.model_validate_json(sys.argv[1]))
print(process.pid, flush=True)
while True:
    answer = process.next_answer(timeout_s=600)
    if isinstance(answer, Ready):
        process.give(RunJob.model_validate_json(sys.argv[2]))
    elif answer.stage == "forward":
        print("forward", flush=True)
"""


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_an_idle_process_ends_by_itself(bundle: Bundle, tmp_path: Path) -> None:
    started = InferenceProcess(opening(bundle, tmp_path))
    assert isinstance(started.next_answer(timeout_s=60), Ready)
    started.end()
    assert started._process.returncode == 0
    with pytest.raises(AttemptError, match="exit status 0"):
        started.next_answer(timeout_s=10)


def test_a_process_that_cannot_start_is_a_failure_of_the_attempt(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "COMMAND", (sys.executable, "-c", "raise SystemExit(7)"))
    started = InferenceProcess(opening(bundle, tmp_path))
    with pytest.raises(AttemptError, match="exit status 7"):
        started.next_answer(timeout_s=20)
    started.end()


def test_a_process_whose_model_cannot_be_opened_says_so_and_ends_in_good_order(
    bundle: Bundle, tmp_path: Path
) -> None:
    started = InferenceProcess(opening(bundle, tmp_path).model_copy(update={"digest": "sha256:" + 64 * "0"}))
    answer = started.next_answer(timeout_s=60)
    assert isinstance(answer, Failed)
    assert "not sha256:000" in answer.message
    wait_until(lambda: started._process.poll() is not None)
    assert started._process.returncode == 1  # and not aborted by the interpreter
    started.end()


def test_what_libraries_print_does_not_reach_the_worker(tmp_path: Path) -> None:
    program = (
        "import os\nfrom service.child import _take_standard_output\n"
        "out = _take_standard_output()\nprint('stray', flush=True)\nos.write(1, b'native')\n"
        "out.write(b'ours')\nout.flush()\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert ran.stdout == b"ours"
    assert b"stray" in ran.stderr
    assert b"native" in ran.stderr


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (ValueError(f"Invalid value for VR PN: {PATIENT}"), "INTERNAL_ERROR", True),
        (MemoryError(), "OUT_OF_MEMORY", True),
        (OSError(errno.ENOSPC, f"no space for {PATIENT}"), "STORAGE_FULL", True),
        (OSError(errno.EIO, PATIENT), "INTERNAL_ERROR", True),
        (AttemptError("X", "Ours.", remedy="Do.", retryable=False), "X", False),
    ],
)
def test_a_failure_names_its_kind_and_no_patient(error: Exception, code: str, retryable: bool) -> None:
    failed = child.describe_failure(error)
    assert (failed.code, failed.retryable) == (code, retryable)
    assert PATIENT not in failed.model_dump_json()
    assert failed.message


class TestOneAttempt:
    """Every way that the pipeline can end is said, once, and about this attempt."""

    def said(
        self, error: BaseException | None, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> list[Answer]:
        def run(job, segmenter, manifest, digest, *, progress):
            progress(Progress("forward", 1, 2))
            if error is not None:
                raise error
            return pipeline.PipelineOutcome((), "r", "float32", {})

        monkeypatch.setattr(pipeline, "run", run)
        said: list[Answer] = []
        child.run_job(order(Path("/nowhere"), ()), bundle, None, said.append)  # type: ignore[arg-type]
        assert [(a.job_id, a.attempt) for a in said] == [("a" * 32, 1)] * 2
        assert said[0] == Advance(job_id="a" * 32, attempt=1, stage="forward", fraction=0.475)
        return said

    def test_well(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        assert isinstance(self.said(None, bundle, monkeypatch)[1], Succeeded)

    def test_with_a_refusal(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        refusal = Refusal(ReasonCode.GANTRY_TILT, "Tilted.", remedy="Straighten.")
        assert isinstance(self.said(refusal, bundle, monkeypatch)[1], Refused)

    @pytest.mark.parametrize("error", [MemoryError(), KeyError(PATIENT), AttemptError("X", "Ours.")])
    def test_badly(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        assert isinstance(self.said(error, bundle, monkeypatch)[1], Failed)


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"{}", b'{"line": "succeeded"}', b'{"line": "no"}', b"\xff\xfe", b"[" * 9000]
)
def test_a_line_that_is_none_of_the_protocol_is_an_error(line: bytes) -> None:
    with pytest.raises(AttemptError) as caught:
        parse_answer(line)
    assert caught.value.code == "PROTOCOL"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", ".hidden", "a/b", ""])
def test_a_result_has_a_plain_name(name: str) -> None:
    line = Succeeded(job_id="a", attempt=1, files=(), runtime="r", precision="p", summary={}).model_dump()
    line["files"] = [{"kind": "labelmap", "name": name, "size_bytes": 1, "sha256": "0"}]
    with pytest.raises(AttemptError):
        parse_answer(Succeeded.model_construct(**line).model_dump_json(warnings=False).encode())


def test_nothing_forks_a_process_with_threads() -> None:
    """A fork takes one thread along, and every lock of the others as it is: runtimes then wait for ever."""
    sources = [*(REPOSITORY / "service").rglob("*.py"), *(REPOSITORY / "models").rglob("*.py")]
    assert len(sources) > 100
    forking = {"multiprocessing", "concurrent.futures.process", "celery.concurrency", "pty"}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module), *(f"{node.module}.{each.name}" for each in node.names)]
            if isinstance(node, ast.Attribute):
                names = [node.attr] if node.attr in ("fork", "forkpty", "ProcessPoolExecutor") else []
                assert names == [], path
            assert not any(name.partition(".")[0] in forking or name in forking for name in names), path
            preparing = [key.arg for key in node.keywords] if isinstance(node, ast.Call) else []
            assert "preexec_fn" not in preparing, path  # Python code between fork and exec


def test_the_process_is_a_program_of_its_own_and_no_fork_of_the_worker(process: InferenceProcess) -> None:
    command = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
    assert command[1:3] == [b"-m", b"service.child"]
