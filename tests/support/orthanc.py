"""Orthanc as the PACS of a hospital: on free ports, with its storage in a folder, auto-routing by Lua."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from programs import program
from waiting import wait_until

# Everything that comes in by DICOM or over REST is routed to the node, results that it sent back too.
_ROUTE_EVERYTHING = """
function OnStoredInstance(instanceId, tags, metadata, origin)
   SendToModality(instanceId, 'segnode')
end
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Orthanc:
    """An Orthanc server, from ``with`` to its end; the node that it routes to is named later."""

    ae_title = "ORTHANC"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.dicom_port, self.http_port = free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.http_port}", timeout=60, trust_env=False)

    def start(self, *, node_port: int) -> None:
        (self._folder / "route.lua").write_text(_ROUTE_EVERYTHING)
        configuration = {
            "Name": "PACS",
            "StorageDirectory": str(self._folder / "storage"),
            "IndexDirectory": str(self._folder / "storage"),
            "DicomAet": self.ae_title,
            "DicomPort": self.dicom_port,
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomCheckCalledAet": False,
            "DicomAlwaysAllowStore": True,
            "DicomModalities": {"segnode": ["SEGNODE", "127.0.0.1", node_port]},
            "LuaScripts": [str(self._folder / "route.lua")],
            "StableAge": 2,
            "Plugins": [],
        }
        path = self._folder / "orthanc.json"
        path.write_text(json.dumps(configuration))
        with (self._folder / "orthanc.log").open("wb") as log:
            self._process = subprocess.Popen(
                [program("Orthanc", "orthanc"), str(path)], stdout=log, stderr=log, cwd=self._folder
            )
        wait_until(self._answers, 60, self.log)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        try:
            return self.client.get("/system").is_success
        except httpx.TransportError:
            return False

    def log(self) -> str:
        return (self._folder / "orthanc.log").read_text(errors="replace")

    def get(self, path: str) -> Any:
        response = self.client.get(path)
        response.raise_for_status()
        return response.json()

    def upload(self, paths: list[Path]) -> None:
        """Put files into the PACS over REST, as if a scanner had sent them."""
        for path in paths:
            self.client.post("/instances", content=path.read_bytes()).raise_for_status()

    def instances_of_modality(self, modality: str) -> list[str]:
        found = self.client.post("/tools/find", json={"Level": "Series", "Query": {"Modality": modality}})
        return [i for series in found.json() for i in self.get(f"/series/{series}")["Instances"]]

    def file(self, instance: str) -> bytes:
        response = self.client.get(f"/instances/{instance}/file")
        response.raise_for_status()
        return response.content

    def jobs_failed(self) -> list[dict[str, Any]]:
        return [job for job in self.get("/jobs?expand") if job["State"] == "Failure"]
