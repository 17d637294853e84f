"""Nothing calls out: every connection of every process of a node, native code too, as the kernel saw it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import write_study
from programs import program
from running_node import ROUTE, RunningNode
from storage_scp import StorageScp
from waiting import wait_until

_CALLS = re.compile(
    r"\b(?:connect|sendto|sendmsg|sendmmsg)\(\d+, .*?sin6?_port=htons\((\d+)\).*?\"([^\"]+)\""
)


@pytest.mark.slow
def test_a_node_talks_to_its_destinations_and_to_nobody_else(models_dir: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    # -D: the tracer detaches from the line of descent, so that the process we start is the node itself.
    calls = "trace=connect,sendto,sendmsg,sendmmsg"
    strace = [
        program("strace", "strace"),
        "-D",
        "-f",
        "-qq",
        "-e",
        calls,
        "-e",
        "signal=none",
        "-o",
        str(trace),
    ]
    home = tmp_path / "home"
    with (
        StorageScp() as pacs,
        RunningNode(
            tmp_path / "node",
            models=models_dir,
            destinations={"pacs": pacs.port},
            routes=[ROUTE],
            environment={"HOME": str(home), "CI": "", "XDG_CACHE_HOME": str(home / ".cache")},
            under=strace,
        ) as node,
    ):
        node.send(write_study(tmp_path / "study", 1))
        wait_until(lambda: len(pacs.objects) == 2, 120, node.log)
    # getaddrinfo connects datagram sockets to port 0 to learn their source address: no packet leaves.
    called = {(address, int(port)) for port, address in _CALLS.findall(trace.read_text()) if port != "0"}
    assert ("127.0.0.1", pacs.port) in called  # the trace sees what there is to see
    assert called == {("127.0.0.1", pacs.port)}
    assert [p for p in home.rglob("*") if "telemetry" in p.name or "onnxruntime" in p.name] == []
