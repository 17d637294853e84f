"""A receiver in a process of its own, for tests that trace or kill it. Run: receiver_process.py DATA_DIR"""

from __future__ import annotations

import sys
from pathlib import Path

from dicom_peer import node_settings

from service.dicom.receive import Receiver
from service.logs import configure_logging
from service.records.database import Records
from service.records.migrate import upgrade
from service.spool import Spool


def main(data_dir: Path) -> None:
    """Receive until standard input is closed; the port is the first line on standard output."""
    configure_logging("WARNING", component="receive")
    settings = node_settings(data_dir)
    upgrade(settings.records_url)
    receiver = Receiver(settings, Records(settings.records_url), Spool(settings.spool_dir))
    receiver.start()
    print(receiver.port, flush=True)
    sys.stdin.read()
    receiver.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
