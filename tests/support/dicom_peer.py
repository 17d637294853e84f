"""A small DICOM object, a receiver to send it to, and a sender that can be as rude as a test needs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, dsutils, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.presentation import build_context

from service.dicom.incoming import close_connection
from service.settings import Settings

MR_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.4"
CALLING_AE_TITLE = "MODALITY"


def node_settings(data_dir: Path, **sections: Any) -> Settings:
    """Settings of a node that lets anybody in, on a free port, with no watermark."""
    dicom = {"port": 0, "allow_unknown_peers": True, "network_timeout_s": 10, **sections.pop("dicom", {})}
    storage = {"low_watermark_bytes": 0, "reserve_bytes": 0, **sections.pop("storage", {})}
    return Settings(data_dir=data_dir, dicom=dicom, storage=storage, **sections)


def make_object(number: int = 1, **attributes: Any) -> Dataset:
    """A 4x4 MR image. Attributes are set by keyword; None deletes one."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = MR_IMAGE_STORAGE
    dataset.SOPInstanceUID = f"2.25.3.{number}"
    dataset.Modality = "MR"
    dataset.PatientName = "Phantom^Petra"
    dataset.PatientID = "P-0815"
    dataset.PatientBirthDate = "19700101"
    dataset.StudyInstanceUID = "2.25.1"
    dataset.SeriesInstanceUID = "2.25.2"
    dataset.InstanceNumber = number
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows = dataset.Columns = 4
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 0
    dataset.PixelData = bytes(range(32))
    for keyword, value in attributes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


def encode(dataset: Dataset) -> bytes:
    """The bytes of the data set, without File Meta Information, as a C-STORE carries them."""
    syntax = dataset.file_meta.TransferSyntaxUID
    encoded: bytes | None = dsutils.encode(
        dataset, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated
    )
    assert encoded is not None
    return encoded


def data_set_of(file: bytes) -> bytes:
    """What comes after the File Meta Information of a file in the DICOM file format."""
    assert file[128:132] == b"DICM"
    return file[144 + int.from_bytes(file[140:144], "little") :]


class Sender:
    """An association to a receiver that sends whatever bytes it is given."""

    def __init__(self, association: Any) -> None:
        self.association = association

    def store(
        self,
        data_set: bytes | Dataset,
        *,
        sop_class_uid: str | None = None,
        sop_instance_uid: str | None = None,
        transfer_syntax_uid: str = ExplicitVRLittleEndian,
    ) -> int | None:
        """Status of a C-STORE; None if there was no answer."""
        response = self.store_response(
            data_set,
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            transfer_syntax_uid=transfer_syntax_uid,
        )
        return None if response is None else int(response.Status)

    def store_response(
        self,
        data_set: bytes | Dataset,
        *,
        sop_class_uid: str | None = None,
        sop_instance_uid: str | None = None,
        transfer_syntax_uid: str = ExplicitVRLittleEndian,
    ) -> Any:
        if isinstance(data_set, Dataset):
            sop_class_uid = sop_class_uid or data_set.SOPClassUID
            sop_instance_uid = sop_instance_uid or data_set.SOPInstanceUID
            transfer_syntax_uid = data_set.file_meta.TransferSyntaxUID
            data_set = encode(data_set)
        request = C_STORE()
        request.MessageID = 1
        request.Priority = 2
        request.AffectedSOPClassUID = sop_class_uid or MR_IMAGE_STORAGE
        request.AffectedSOPInstanceUID = sop_instance_uid or "2.25.3.1"
        request.DataSet = BytesIO(data_set)
        return self.exchange(request, self.context_id(request.AffectedSOPClassUID, transfer_syntax_uid))

    def context_id(self, sop_class_uid: str, transfer_syntax_uid: str) -> int:
        for context in self.association.accepted_contexts:
            if context.abstract_syntax == sop_class_uid and transfer_syntax_uid in context.transfer_syntax:
                return int(context.context_id)
        raise AssertionError(f"no context for {sop_class_uid} in {transfer_syntax_uid}")

    def exchange(self, request: Any, context_id: int) -> Any:
        """Send a DIMSE request and wait for what comes back."""
        association = self.association
        association._reactor_checkpoint.clear()
        while not association._is_paused:
            time.sleep(0.0005)
        try:
            association.dimse.send_msg(request, context_id)
            _, response = association.dimse.get_msg(block=True)
        finally:
            association._reactor_checkpoint.set()
        return response


@contextmanager
def associated(
    port: int,
    contexts: Sequence[tuple[str, Sequence[str]]] = ((MR_IMAGE_STORAGE, (ExplicitVRLittleEndian,)),),
    *,
    calling_ae_title: str = CALLING_AE_TITLE,
    called_ae_title: str = "SEGNODE",
    timeout_s: float = 20.0,
) -> Iterator[Sender]:
    """An association with a receiver on this machine; released at the end if it is still there."""
    entity = AE(ae_title=calling_ae_title)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = timeout_s
    association = entity.associate(
        "127.0.0.1",
        port,
        ae_title=called_ae_title,
        contexts=[build_context(uid, list(syntaxes)) for uid, syntaxes in contexts],
        evt_handlers=[(evt.EVT_CONN_CLOSE, close_connection)],
    )
    try:
        yield Sender(association)
    finally:
        if association.is_established:
            association.release()
