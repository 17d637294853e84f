"""The shipped compose file brought up with podman-compose, as a site would, and talked to from outside."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import yaml
from waiting import wait_until

from service.dicom.send import OutcomeKind, send_files
from service.settings import Destination

REPOSITORY = Path(__file__).resolve().parents[2]
STAND_INS = ("postgres", "broker", "proxy", "orthanc")
SERVICES = ("postgres", "broker", "receiver", "api", "worker", "proxy", "orthanc")
CALLING_AE_TITLE = "MODALITY"
INSIDE = "10.213.7.0/24"
START_TIMEOUT_S = 600.0


class ComposeSite:
    """A site in a folder, up from ``with`` until its end; containers and volumes are removed then.

    Parameters
    ----------
    folder : Path
        Becomes the site's folder: configuration, secrets, signing key.
    podman, podman_compose : str
        The programs.
    base_image : str
        What the images are built on; it has python3 3.11 with venv, and apt.
    destination_port : int
        Where results go, on this machine.
    """

    def __init__(
        self, folder: Path, *, podman: str, podman_compose: str, base_image: str, destination_port: int
    ) -> None:
        self.folder = folder
        self.project = f"segnode-test-{os.getpid()}"
        self.host = own_address()
        self.dicom_port, self.https_port, self.orthanc_port, orthanc_dicom_port = free_ports(4)
        self._podman = podman
        self._base_image = base_image
        self._destination_port = destination_port
        self._compose = [podman_compose, "-p", self.project, "-f", str(REPOSITORY / "docker-compose.yml")]
        self._environment = {
            **os.environ,
            "SEGNODE_SITE": str(folder),
            "SEGNODE_BASE_IMAGE": base_image,
            "SEGNODE_IMAGE": "localhost/segnode:test",
            "SEGNODE_LOG_DRIVER": "k8s-file",
            "SEGNODE_DICOM_LISTEN": f"0.0.0.0:{self.dicom_port}",
            "SEGNODE_HTTPS_LISTEN": f"0.0.0.0:{self.https_port}",
            "SEGNODE_HOSTNAME": "segnode.test",
            "SEGNODE_RECEIVER_CPUS": "1",
            "SEGNODE_API_CPUS": "1",
            "SEGNODE_WORKER_CPUS": "1",
            "SEGNODE_WORKER_MEMORY": "4g",
            "ORTHANC_HTTP_PORT": str(self.orthanc_port),
            "ORTHANC_DICOM_PORT": str(orthanc_dicom_port),
            "CONTAINER_ENGINE": podman,
            "COMPOSE": f"{podman_compose} -p {self.project}",
            "PATH": f"{Path(podman).parent}:{os.environ['PATH']}",
            "COMPOSE_PROFILES": "pacs",
            "SEGNODE_INSIDE": INSIDE.removesuffix(".0/24"),
            **{f"{name.upper()}_IMAGE": f"localhost/stand-in-{name}:test" for name in STAND_INS},
        }
        self._secret = ""

    def build(self) -> None:
        """Build the node's image from the shipped Dockerfile, and the images that stand in for the others."""
        for name in STAND_INS:
            self.podman(
                *("build", "--quiet", "--target", name, "--tag", f"localhost/stand-in-{name}:test"),
                *("--build-arg", f"BASE_IMAGE={self._base_image}", "tests/compose/stand_ins"),
            )
        self.compose("build", "worker")

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "node.yaml").write_text(yaml.safe_dump(self._configuration()))
        self._run(["deploy/setup"])
        try:
            self.compose("up", "-d")
            self.until_ready()
            self._run(["deploy/install-models"])
            arguments = ("segnode", "keys", "create", "test", "--role", "operator")
            self._secret = self.compose("exec", "-T", "api", *arguments).strip().splitlines()[-1]
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if "SEGNODE_COMPOSE_KEEP" not in os.environ:
            self.compose("down", "--volumes", "--timeout", "5")

    def _configuration(self) -> dict[str, Any]:
        return {
            "dicom": {
                "peers": [
                    {"ae_title": CALLING_AE_TITLE, "addresses": ["0.0.0.0/0"]},
                    {"ae_title": "PACS", "addresses": [INSIDE]},  # for the acceptance, as its paper says
                ]
            },
            "storage": {"low_watermark_bytes": 10**9, "reserve_bytes": 10**8},
            "worker": {"lease_s": 20},
            "delivery": {"first_retry_s": 1, "maximum_retry_s": 5},
            "destinations": [
                {"name": "pacs", "ae_title": "PACS", "host": self.host, "port": self._destination_port},
                {"name": "orthanc", "ae_title": "ORTHANC", "host": "orthanc", "port": 4242},
            ],
            "routes": [
                {
                    "name": "hippocampus",
                    "model": "hippocampus",
                    "match": {"Modality": "MR"},
                    "quiet_time_s": 3,
                    "destinations": ["pacs", "orthanc"],
                }
            ],
        }

    @property
    def authorization(self) -> str:
        """The value of the header of the same name, with the test's own key."""
        return f"Bearer {self._secret}"

    # --- Containers

    def podman(self, *arguments: str) -> str:
        return self._run([self._podman, *arguments])

    def compose(self, *arguments: str) -> str:
        return self._run([*self._compose, *arguments])

    def inspect(self, service: str) -> dict[str, Any]:
        """What podman knows of the container of a service."""
        name = self.podman(
            *("ps", "--all", "--format", "{{.Names}}"),
            *("--filter", f"label=io.podman.compose.project={self.project}"),
            *("--filter", f"label=com.docker.compose.service={service}"),
        ).strip()
        found: dict[str, Any] = json.loads(self.podman("inspect", name))[0]
        return found

    def healthy(self, service: str) -> bool:
        """Whether the health check of the compose file passes; without systemd podman has no timer for it."""
        name = self.inspect(service)["Name"]
        return subprocess.run([self._podman, "healthcheck", "run", name], check=False).returncode == 0

    def kill(self, service: str) -> int:
        """SIGKILL to the first process of a container, as if it had crashed. Returns its PID."""
        pid = int(self.inspect(service)["State"]["Pid"])
        os.kill(pid, signal.SIGKILL)
        return pid

    def until_back(self, service: str, killed_pid: int) -> None:
        """Wait until a container that was killed runs again, by its restart policy alone."""

        def back() -> bool:
            state = self.inspect(service)["State"]
            return bool(state["Running"]) and int(state["Pid"]) not in (0, killed_pid)

        wait_until(back, START_TIMEOUT_S, self.logs)

    def logs(self) -> str:
        ends = []
        for service in SERVICES:
            ended = subprocess.run(
                [*self._compose, "logs", "--tail", "30", service],
                check=False,
                env=self._environment,
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            ends.append(f"--- {service}\n{ended.stdout}")
        return "\n".join(ends)

    def script(self, name: str) -> str:
        """What a script of the repository says on standard output."""
        return self._run([name])

    def run_as_written(self, lines: Sequence[str]) -> str:
        """Run commands of a paper in a shell: ``docker`` is the engine at hand, volumes are this site's."""
        engine = (
            'docker() { if [ "$1" = compose ]; then shift; '
            f'{shlex.join(self._compose)} "$@"; else {shlex.quote(self._podman)} "$@"; fi; }}'
        )
        script = "\n".join(lines).replace(" segnode_", f" {self.project}_")
        return self._run(["bash", "-euxo", "pipefail", "-c", f"{engine}\n{script}"])

    def _run(self, command: Sequence[str]) -> str:
        ended = subprocess.run(
            command,
            check=False,
            env=self._environment,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        said = f"{' '.join(command)}: status {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        assert ended.returncode == 0, said
        return ended.stdout

    # --- DICOM and HTTP

    def send(self, paths: Sequence[Path]) -> bool:
        """Send a study from this machine; True if every object was answered with success."""
        try:
            socket.create_connection((self.host, self.dicom_port), timeout=10).close()
        except OSError:
            return False  # pynetdicom would leave its socket open
        node = Destination(name="node", ae_title="SEGNODE", host=self.host, port=self.dicom_port)
        outcomes = list(send_files(paths, node, calling_ae_title=CALLING_AE_TITLE))
        return all(outcome.kind is OutcomeKind.DELIVERED for _, outcome in outcomes)

    def get(self, path: str) -> Any:
        """What the HTTP interface answers through the proxy, with the site's own certificate trusted."""
        trusted = ssl.create_default_context(cafile=str(self.folder / "secrets" / "tls_certificate"))
        headers = {"Authorization": self.authorization} if self._secret else {}
        with httpx.Client(verify=trusted, trust_env=False, timeout=60) as client:
            answer = client.get(f"https://localhost:{self.https_port}{path}", headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def status_of(self, path: str, **headers: str) -> int:
        """What the proxy answers at this machine's own address, which its certificate does not name."""
        trusted = ssl.create_default_context(cafile=str(self.folder / "secrets" / "tls_certificate"))
        trusted.check_hostname = False
        with httpx.Client(verify=trusted, trust_env=False, timeout=60) as client:
            return client.get(f"https://{self.host}:{self.https_port}{path}", headers=headers).status_code

    def origins_of(self, kind: str) -> list[str]:
        """Where those came from who did something, by the audit trail, the oldest first."""
        query = f"SELECT origin FROM event WHERE kind = '{kind}' ORDER BY event_id"
        return self.compose(
            *("exec", "-T", "postgres", "psql", "-U", "segnode", "-d", "segnode", "-Atc", query)
        ).split()

    def address_of(self, service: str) -> str:
        """The address of a service's container on the network inside."""
        networks = self.inspect(service)["NetworkSettings"]["Networks"]
        return str(networks[f"{self.project}_inside"]["IPAddress"])

    def until_ready(self) -> None:
        """Wait until the interface answers through the proxy, and the receiver a C-ECHO."""

        def ready() -> bool:
            try:
                self.get("/healthz")
            except (httpx.HTTPError, AssertionError):
                return False
            return self.healthy("receiver")

        wait_until(ready, START_TIMEOUT_S, self.logs)

    def jobs_of(self, study_instance_uid: str) -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = self.get(f"/api/v1/studies/{study_instance_uid}")["jobs"]
        return jobs

    def orthanc_segmentations(self) -> int:
        """How many instances of modality SEG the profile's Orthanc has."""
        query = {"Level": "Instance", "Query": {"Modality": "SEG"}}
        answer = httpx.post(f"http://127.0.0.1:{self.orthanc_port}/tools/find", json=query, trust_env=False)
        return len(answer.json())


def patiently(step: Callable[[], bool], timeout_s: float) -> None:
    """Repeat what may fail while a container starts, such as sending to it, until it succeeds."""
    deadline = time.monotonic() + timeout_s
    while not step():
        assert time.monotonic() < deadline, "still failing"
        time.sleep(1.0)


def own_address() -> str:
    """The address of this machine that its containers reach it by."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # documentation's network: nothing is sent by a datagram's connect
        return str(probe.getsockname()[0])


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("0.0.0.0", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
