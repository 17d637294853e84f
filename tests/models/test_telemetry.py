"""No runtime reports home: neither from Python nor from native code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import sys, time
seen = []
WATCHED = {"socket.connect", "socket.getaddrinfo", "socket.sendto", "os.fork", "os.posix_spawn"}
sys.addaudithook(lambda event, args: seen.append(event) if event in WATCHED else None)
import models, openvino, onnxruntime
from openvino.tools.ovc import convert_model
time.sleep(1.0)
print(",".join(seen), "openvino_telemetry.main" in sys.modules)
"""


def test_importing_the_runtimes_calls_nobody_and_collects_nothing(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "CI")}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / ".cache")}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
