"""An inference process that does as it is told: ``python scripted_child.py FOLDER``.

``FOLDER/script.json`` lists what to do with the first job, the second, and so on, over all processes that
share the folder. What was given is written to ``FOLDER/<number>.given``. Standard library only: it starts
in a moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

FOREVER_S = 600


def say(line: str, **values: Any) -> None:
    print(json.dumps({"line": line, **values}), flush=True)


def succeed(of: dict[str, Any], order: dict[str, Any], *, write: bool = True) -> None:
    out = Path(order["job"]["output_dir"])
    files = []
    for kind, name, uid in (
        ("segmentation", "segmentation.dcm", f"2.25.{int(order['job_id'][:8], 16)}"),
        ("measurements", "measurements.json", None),
    ):
        data = f"{name} of {order['job_id']}".encode()
        if write:
            out.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
        files.append(
            {
                "kind": kind,
                "name": name,
                "size_bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "sop_class_uid": "1.2.840.10008.5.1.4.1.1.66.4" if uid else None,
                "sop_instance_uid": uid,
            }
        )
    say("succeeded", **of, files=files, runtime="scripted", precision="float32", summary={"found": 1})


def act(what: str, order: dict[str, Any]) -> None:
    of = {"job_id": order["job_id"], "attempt": order["attempt"]}
    say("progress", **of, stage="forward", fraction=0.25)
    match what.split():
        case ["succeed"]:
            succeed(of, order)
        case ["succeed_after", seconds]:
            end = time.monotonic() + float(seconds)
            while (left := end - time.monotonic()) > 0:
                say("progress", **of, stage="forward", fraction=0.9 - left / 1000)
                time.sleep(0.02)
            succeed(of, order)
        case ["refuse"]:
            say(
                "refused",
                **of,
                code="GANTRY_TILT",
                message="Tilted by 18.5 degrees.",
                remedy="Straighten it.",
            )
        case ["refuse", code]:
            say("refused", **of, code=code, message="It is too much.", remedy="Take less.")
        case ["fail", retryable]:
            say(
                "failed",
                **of,
                code="BROKEN",
                message="It broke.",
                remedy="Mend.",
                retryable=retryable == "again",
            )
        case ["hang"]:
            time.sleep(FOREVER_S)
        case ["repeat"]:  # busy, but getting nowhere
            while True:
                say("progress", **of, stage="forward", fraction=0.25)
                time.sleep(0.02)
        case ["crawl"]:  # getting on, but for ever
            for i in range(10**9):
                say("progress", **of, stage="forward", fraction=i / 10**9)
                time.sleep(0.02)
        case ["die", name]:
            os.kill(os.getpid(), signal.Signals[name])
            time.sleep(FOREVER_S)
        case ["exit", status]:
            os._exit(int(status))
        case ["babble"]:
            print("Traceback (most recent call last):", flush=True)
            time.sleep(FOREVER_S)
        case ["of_another_attempt"]:
            succeed({**of, "attempt": of["attempt"] - 1}, order)
        case ["of_another_job"]:
            succeed({**of, "job_id": "0" * 32}, order)
        case ["without_files"]:
            succeed(of, order, write=False)


def main() -> None:
    folder = Path(sys.argv[1])
    script = json.loads((folder / "script.json").read_text())
    opening = json.loads(sys.stdin.readline())
    if script[0] == "cannot_load":
        say("failed", code="MODEL_UNSUPPORTED", message="No.", remedy="Take another.", retryable=False)
        return
    say("ready")
    for line in sys.stdin:
        order = json.loads(line)
        number = len(list(folder.glob("*.given")))
        given = {"pid": os.getpid(), "digest": opening["digest"], **order}
        unfinished = folder / "given.new"
        unfinished.write_text(json.dumps(given))
        unfinished.rename(folder / f"{number}.given")
        act(script[number], order)


if __name__ == "__main__":
    main()
