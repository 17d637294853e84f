"""A whole node as a site runs it: ``segnode serve`` in a process, talked to over DICOM and HTTP alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
import yaml
from waiting import wait_until

from service.dicom.send import OutcomeKind, send_files
from service.keys import create_key
from service.records.database import Records, utc_now
from service.records.tables import Role
from service.settings import Destination

SEGNODE = (sys.executable, "-m", "service.cli")
CALLING_AE_TITLE = "MODALITY"
ROUTE: dict[str, Any] = {
    "name": "mr",
    "model": "threshold",
    "match": {"Modality": "MR"},
    "quiet_time_s": 6.0,  # on a busy machine a sender may pause for some seconds, and one study become two
    "destinations": ["pacs"],
}


class RunningNode:
    """A node in a folder, from :meth:`start` (or ``with``) until :meth:`stop`.

    Parameters
    ----------
    folder : Path
        Gets the configuration, the data and the log.
    models : Path
        A registry to begin with; it is copied.
    destinations : dict
        Port by name, on this machine.
    profiles : dict
        What a destination gets, by its name; the default unless given.
    routes : sequence of dict
        As in the configuration.
    environment : dict
        Variables of the node beside those of this process.
    under : sequence of str
        A command that the node is run under, such as a tracer; it must become the node's process.
    sections : dict
        Further sections of the configuration.
    """

    def __init__(
        self,
        folder: Path,
        *,
        models: Path,
        destinations: dict[str, int] | None = None,
        profiles: dict[str, dict[str, Any]] | None = None,
        routes: Sequence[dict[str, Any]] = (),
        environment: dict[str, str] | None = None,
        under: Sequence[str] = (),
        **sections: Any,
    ) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.log_path = folder / "node.log"
        self.config = folder / "node.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        self.data_dir.mkdir(exist_ok=True)
        shutil.copytree(models, self.data_dir / "models")
        dicom = {"port": 0, "peers": [{"ae_title": CALLING_AE_TITLE}, {"ae_title": "ORTHANC"}]}
        configuration = {
            "data_dir": str(self.data_dir),
            "dicom": dicom | sections.pop("dicom", {}),
            "http": {"port": 0},
            "storage": {"low_watermark_bytes": 0, "reserve_bytes": 0},
            "worker": {"poll_interval_s": 0.05, "threads": 1} | sections.pop("worker", {}),
            "delivery": {"first_retry_s": 0.2, "maximum_retry_s": 1.0} | sections.pop("delivery", {}),
            "destinations": [
                {
                    "name": name,
                    "ae_title": name.upper(),
                    "host": "127.0.0.1",
                    "port": port,
                    "profile": (profiles or {}).get(name, {}),
                }
                for name, port in (destinations or {}).items()
            ],
            "routes": list(routes),
            **sections,
        }
        self.config.write_text(yaml.safe_dump(configuration))
        self._environment = {**os.environ, **(environment or {})}
        self._under = list(under)
        self._process: subprocess.Popen[bytes] | None = None
        self._keys: dict[Role, str] = {}
        self.dicom_port = self.http_port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        ports_path = self.data_dir / "ports.json"
        ports_path.unlink(missing_ok=True)  # a killed supervisor leaves its own
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._under, *SEGNODE, "serve", "--config", str(self.config)],
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        wait_until(lambda: ports_path.exists() or self._process.poll() is not None, 120, self.log)
        assert self._process.poll() is None, self.log()
        ports = json.loads(ports_path.read_text())
        self.dicom_port, self.http_port = ports["dicom"], ports["http"]

    def stop(self) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.terminate()
            assert self._process.wait(60) == 0, self.log()

    def kill(self) -> None:
        """SIGKILL to the supervisor alone; its processes are left to notice."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def processes(self) -> dict[str, psutil.Process]:
        """Every process of the node by what it does: serve, receive, api, worker, inference."""
        assert self._process is not None
        serve = psutil.Process(self._process.pid)
        found = {"serve": serve}
        for child in serve.children(recursive=True):
            try:
                command = child.cmdline()
            except psutil.Error:
                continue
            name = next((n for n in ("receive", "api", "worker") if n in command), None)
            if name is None and "service.child" in command:
                name = "inference"
            if name is not None:
                found[name] = child
        return found

    def kill_part(self, name: str) -> bool:
        """SIGKILL to one of the node's processes, if it is there."""
        process = self.processes().get(name)
        if process is None:
            return False
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            return False
        return True

    @property
    def environment(self) -> dict[str, str]:
        """What a command that works on this node needs in its environment."""
        return dict(self._environment)

    # --- DICOM

    @property
    def destination(self) -> Destination:
        return Destination(name="node", ae_title="SEGNODE", host="127.0.0.1", port=self.dicom_port)

    def send(self, paths: Sequence[Path]) -> list[Path]:
        """Send files; the ones that were answered with success."""
        outcomes = send_files(paths, self.destination, calling_ae_title=CALLING_AE_TITLE)
        return [path for path, outcome in outcomes if outcome.kind is OutcomeKind.DELIVERED]

    # --- HTTP

    def client(self, role: Role = Role.ADMIN) -> httpx.Client:
        if role not in self._keys:
            records = Records(f"sqlite:///{self.data_dir / 'segnode.sqlite'}")
            with records.write() as session:
                _, self._keys[role] = create_key(session, f"test {role}", role, now=utc_now())
            records.close()
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.http_port}/api/v1",
            headers={"Authorization": f"Bearer {self._keys[role]}"},
            timeout=60,
            trust_env=False,
        )

    def get(self, path: str) -> Any:
        with self.client() as client:
            response = client.get(path)
            response.raise_for_status()
            return response.json()

    def items(self, path: str) -> list[dict[str, Any]]:
        """Every item of a list, page by page."""
        found: list[dict[str, Any]] = []
        after: str | None = None
        while True:
            joint = "&" if "?" in path else "?"
            page = self.get(path + (f"{joint}after={after}" if after else ""))
            found += page["items"]
            after = page["next"]
            if after is None:
                return found

    def jobs(self) -> list[dict[str, Any]]:
        return self.items("/jobs")

    def wait_for_jobs(self, count: int, *, within_s: float = 120.0) -> list[dict[str, Any]]:
        """Wait until there are ``count`` jobs and all have ended; oldest first."""
        ended = ("succeeded", "refused", "failed", "cancelled")
        wait_until(
            lambda: len(jobs := self.jobs()) >= count and all(job["state"] in ended for job in jobs),
            within_s,
            lambda: (
                f"{[(j['state'], j['reason'], j['progress']) for j in self.jobs()]}\n{self.log()[-4000:]}"
            ),
        )
        return self.jobs()[::-1]

    def segment(self, *files: Path, model: str, **fields: str) -> dict[str, Any]:
        """Upload files and wait for the end of the job; the job, also where it was refused."""
        with self.client(Role.UPLOADER) as client:
            response = self.post_files(client, files, model=model, **fields)
            assert response.status_code == 202, response.text
            location = response.headers["Location"].removeprefix("/api/v1")
            wait_until(
                lambda: client.get(location).json()["state"] not in ("queued", "running"), 120, self.log
            )
            return dict(client.get(location).json())

    def post_files(self, client: httpx.Client, files: Sequence[Path], **fields: str) -> httpx.Response:
        parts = [("files", (path.name, path.read_bytes(), "application/octet-stream")) for path in files]
        return client.post("/segmentations", data=fields, files=parts)

    def fetch(self, job: dict[str, Any], what: str) -> bytes:
        with self.client() as client:
            response = client.get(f"/segmentations/{job['job_id']}/{what}")
            response.raise_for_status()
            return response.content

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_alive(process: psutil.Process) -> bool:
    """False for one that has ended, also where nobody has asked for its exit status yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
