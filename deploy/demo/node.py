"""A node of its own for the demo: its configuration, its process, and a key to ask it questions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

CONFIGURATION = """\
# The node of the demo. Ports of 0 take any that are free; a hospital's node has 11112 and 8080.
data_dir: {data_dir}
dicom:
  ae_title: SEGNODE
  port: 0
  peers:
    - ae_title: SCANNER
http:
  port: 0
storage:
  low_watermark_bytes: 100000000
  reserve_bytes: 50000000
destinations:
  - name: viewer
    ae_title: VIEWER
    host: 127.0.0.1
    port: {viewer_port}
routes:
  - name: brain
    model: brain-structures
    match: {{instances: {{min: 1}}}}  # every image series; a hospital says more, such as Modality: MR
    quiet_time_s: 2
    destinations: [viewer]
"""
START_TIMEOUT_S = 180


class DemoNode:
    """``segnode serve`` in a folder, from its start until it is closed."""

    def __init__(self, folder: Path, *, viewer_port: int) -> None:
        self._config = folder / "node.yaml"
        self._data_dir = folder / "node"
        self.log = folder / "node.log"
        shutil.rmtree(self._data_dir, ignore_errors=True)
        self._config.write_text(
            CONFIGURATION.format(data_dir=json.dumps(str(self._data_dir)), viewer_port=viewer_port)
        )
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*_SEGNODE, "serve", "--config", str(self._config)], stdout=log, stderr=log
            )
        try:
            ports = self._wait_for_ports()
            self.dicom_port, self.http_port = int(ports["dicom"]), int(ports["http"])
            self._secret = self._run("keys", "create", "demo", "--role", "operator").strip()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DemoNode:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the node, and wait until it has."""
        self._process.terminate()
        self._process.wait()

    def study(self, study_instance_uid: str) -> dict[str, Any] | None:
        """What the node knows of a study, over REST; None if nothing yet."""
        request = Request(
            f"http://127.0.0.1:{self.http_port}/api/v1/studies/{study_instance_uid}",
            headers={"Authorization": f"Bearer {self._secret}"},
        )
        try:
            with urlopen(request, timeout=30) as response:
                document: dict[str, Any] = json.load(response)
                return document
        except HTTPError as error:
            if error.code == 404:
                return None
            raise

    def send(self, folder: Path) -> None:
        """Send a folder to the node's DICOM port, as a scanner or a PACS would."""
        peer = f"SEGNODE@127.0.0.1:{self.dicom_port}"
        subprocess.run([*_SEGNODE, "send", str(folder), peer, "--calling-ae-title", "SCANNER"], check=True)

    def _run(self, *command: str) -> str:
        arguments = [*_SEGNODE, *command, "--config", str(self._config)]
        return subprocess.run(
            arguments, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ).stdout

    def _wait_for_ports(self) -> dict[str, int]:
        path = self._data_dir / "ports.json"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not path.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(
                    f"The node did not start. Its log, {self.log}, says why:\n" + self.log.read_text()
                )
            time.sleep(0.1)
        ports: dict[str, int] = json.loads(path.read_text())
        return ports


_SEGNODE = (sys.executable, "-m", "service.cli")
