"""Nothing calls out: libraries that would report home are told not to, before they are imported.

- OpenVINO sends an event by the package ``openvino_telemetry`` whenever it is imported, from a forked
  process; NNCF does so when it quantizes. Both go on without the package where it cannot be imported.
- ONNX Runtime (from 1.31 on Linux) collects events in a database under ``~/.cache`` and uploads them,
  unless the environment says no before its library is loaded.
"""

from __future__ import annotations

import os
import sys


def forbid_telemetry() -> None:
    """Turn the telemetry of libraries off for this process and those that it starts."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # importing it raises ImportError
