"""A storage SCP for tests: keeps what it is sent, and misbehaves as it is told."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.presentation import AllStoragePresentationContexts
from pynetdicom.sop_class import SegmentationStorage, Verification

from service.dicom.incoming import close_connection


@dataclass(frozen=True)
class StoredObject:
    """One C-STORE as it came: the bytes of the data set, not decoded."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    calling_ae_title: str
    data_set: bytes


class StorageScp:
    """Listens on a free port of the loopback interface, or where it is told, from ``with`` to its end.

    Parameters
    ----------
    statuses : sequence of int
        Answers to the first C-STOREs, in order; success after them. A failure keeps nothing.
    sop_class_uids : sequence of str, optional
        The classes accepted; every standard storage class unless given.
    transfer_syntax_uids : sequence of str
        The transfer syntaxes accepted.
    delay_s : float
        How long each C-STORE takes.
    abort_on : callable, optional
        Given the number of the C-STORE (from 0), says whether to abort the association instead of answering.
    require_called_ae_title : bool
        Whether another called AE title than ``ae_title`` is rejected.
    ssl_context : ssl.SSLContext, optional
        What connections are secured with; plain text unless given.
    """

    def __init__(
        self,
        *,
        statuses: Sequence[int] = (),
        sop_class_uids: Sequence[str] | None = None,
        transfer_syntax_uids: Sequence[str] = (ExplicitVRLittleEndian, ImplicitVRLittleEndian),
        delay_s: float = 0.0,
        abort_on: Callable[[int], bool] | None = None,
        ae_title: str = "PACS",
        require_called_ae_title: bool = False,
        port: int = 0,
        ssl_context: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.objects: list[StoredObject] = []
        self.attempts = 0
        self.associations = 0
        self.ae_title = ae_title
        self._statuses = list(statuses)
        self._delay_s = delay_s
        self._abort_on = abort_on
        self._lock = threading.Lock()
        self._port = port
        self._host = host
        self._ssl_context = ssl_context
        self._entity = AE(ae_title=ae_title)
        self._entity.require_called_aet = require_called_ae_title
        if sop_class_uids is None:
            sop_class_uids = [str(c.abstract_syntax) for c in AllStoragePresentationContexts]
        for uid in sop_class_uids:
            self._entity.add_supported_context(uid, list(transfer_syntax_uids))
        self._entity.add_supported_context(Verification)
        self._server: Any = None

    def __enter__(self) -> Self:
        self._server = self._entity.start_server(
            (self._host, self._port),
            block=False,
            ssl_context=self._ssl_context,
            evt_handlers=[
                (evt.EVT_C_STORE, self._on_store),
                (evt.EVT_ACCEPTED, self._on_accepted),
                (evt.EVT_CONN_CLOSE, close_connection),
            ],
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._entity.shutdown()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Not there until the block ends; it must have a port of its own for that."""
        assert self._port, "give it a port, so that it comes back where it was"
        self._entity.shutdown()
        try:
            yield
        finally:
            self.__enter__()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def segmentations(self) -> list[StoredObject]:
        """The objects of Segmentation Storage alone."""
        return [each for each in self.objects if each.sop_class_uid == SegmentationStorage]

    def _on_accepted(self, _event: Any) -> None:
        with self._lock:
            self.associations += 1

    def _on_store(self, event: Any) -> int:
        with self._lock:
            number = self.attempts
            self.attempts += 1
            status = self._statuses.pop(0) if self._statuses else 0x0000
        if self._delay_s:
            time.sleep(self._delay_s)
        if self._abort_on is not None and self._abort_on(number):
            event.assoc.abort()
            return 0x0000
        if status == 0x0000 or status >> 12 == 0xB:
            stored = StoredObject(
                sop_class_uid=str(event.request.AffectedSOPClassUID),
                sop_instance_uid=str(event.request.AffectedSOPInstanceUID),
                transfer_syntax_uid=str(event.context.transfer_syntax),
                calling_ae_title=event.assoc.requestor.ae_title,
                data_set=event.request.DataSet.getvalue(),
            )
            with self._lock:
                self.objects.append(stored)
        return status
