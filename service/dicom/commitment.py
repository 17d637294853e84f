"""Storage commitment, PS3.4 annex J: ask a peer to confirm that it keeps objects, and read its report."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import StorageCommitmentPushModel

from service.dicom.contexts import EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN
from service.dicom.elements import PARSE_ERRORS, integer, items, quiet, string
from service.dicom.send import OutcomeKind, OutgoingAssociation, SendOutcome
from service.settings import Destination

_WELL_KNOWN_INSTANCE = "1.2.840.10008.1.20.1.1"
_REQUEST = 1  # action type: request storage commitment
_SUCCESS, _FAILURES_EXIST = 1, 2  # event types
NO_SUCH_OBJECT = 0x0112  # failure reason: the peer does not have it
_PROCESSING_FAILURE = 0x0110


@dataclass(frozen=True)
class CommitmentReport:
    """What a peer says about a request: which objects it keeps, and why it does not keep the others.

    ``failed`` maps SOP Instance UIDs to failure reasons of PS3.3 table C.14-1.
    """

    transaction_uid: str
    stored: frozenset[str]
    failed: Mapping[str, int] = field(default_factory=dict)


TakeReport = Callable[[CommitmentReport], bool]
"""Writes a report down; False if no such request is known."""


def commitment_context() -> PresentationContext:
    """The context of requests, and (where a peer opens the association) of its reports."""
    return build_context(StorageCommitmentPushModel, [EXPLICIT_VR_LITTLE_ENDIAN, IMPLICIT_VR_LITTLE_ENDIAN])


def commitment_contexts(proposed_roles: Mapping[Any, Any]) -> list[PresentationContext]:
    """What to accept of a peer that opens an association to report: it proposes itself as the SCP.

    Nobody can ask the node to commit itself to anything, so without that role nothing is accepted.

    Parameters
    ----------
    proposed_roles : mapping of UID to SCP/SCU Role Selection item
        Those of the A-ASSOCIATE-RQ.
    """
    role = proposed_roles.get(StorageCommitmentPushModel)
    if role is None or not role.scp_role:
        return []
    context = commitment_context()
    context.scu_role, context.scp_role = False, True
    return [context]


def request_commitment(
    destination: Destination,
    transaction_uid: str,
    objects: Sequence[tuple[str, str]],
    take_report: TakeReport,
    *,
    calling_ae_title: str,
    listen_s: float,
) -> SendOutcome:
    """Ask a peer to commit itself to objects, and listen a while for its report on the same association.

    Parameters
    ----------
    transaction_uid : str
        Identifies the request; its report names it, on this association or on another that the peer opens.
    objects : sequence of (SOP class UID, SOP instance UID)
        What it was sent.
    take_report : callable
        Given a report that comes on this association, from a thread of its own.
    listen_s : float
        How long to wait for it. A peer that reports on an association of its own is not waited for.

    Returns
    -------
    SendOutcome
        DELIVERED if the peer took the request. Never raises for what the peer or the network does.
    """
    reported = threading.Event()

    def on_report(event: Any) -> tuple[int, None]:
        status = answer_report(event, take_report)
        reported.set()
        return status, None

    with OutgoingAssociation(
        destination, calling_ae_title, [commitment_context()], on_event_report=on_report
    ) as association:
        if association.failure is not None:
            return association.failure
        outcome = association.act(
            _request(transaction_uid, objects),
            action_type=_REQUEST,
            sop_class_uid=str(StorageCommitmentPushModel),
            sop_instance_uid=_WELL_KNOWN_INSTANCE,
        )
        if outcome.kind is OutcomeKind.DELIVERED:
            reported.wait(listen_s)
        return outcome


def answer_report(event: Any, take_report: TakeReport) -> int:
    """Take an N-EVENT-REPORT; the status to answer with. Never raises: pynetdicom would not say why."""
    with quiet():
        try:
            report = read_report(event.event_type, event.event_information)
        except PARSE_ERRORS:
            return _PROCESSING_FAILURE
    if report is None or not take_report(report):
        return _PROCESSING_FAILURE
    return 0x0000


def read_report(event_type: int, dataset: Dataset) -> CommitmentReport | None:
    """What an N-EVENT-REPORT says; None for one that says nothing that can be used."""
    transaction_uid = string(dataset, "TransactionUID")
    if event_type not in (_SUCCESS, _FAILURES_EXIST) or not transaction_uid:
        return None
    failed = {
        str(uid): integer(each, "FailureReason") or _PROCESSING_FAILURE
        for each in items(dataset, "FailedSOPSequence")
        if (uid := string(each, "ReferencedSOPInstanceUID"))
    }
    stored = frozenset(
        str(uid)
        for each in items(dataset, "ReferencedSOPSequence")
        if (uid := string(each, "ReferencedSOPInstanceUID"))
    )
    return CommitmentReport(transaction_uid, stored - failed.keys(), failed)


def _request(transaction_uid: str, objects: Sequence[tuple[str, str]]) -> Dataset:
    dataset = Dataset()
    dataset.TransactionUID = transaction_uid
    references = []
    for sop_class_uid, sop_instance_uid in objects:
        reference = Dataset()
        reference.ReferencedSOPClassUID = sop_class_uid
        reference.ReferencedSOPInstanceUID = sop_instance_uid
        references.append(reference)
    dataset.ReferencedSOPSequence = DicomSequence(references)
    return dataset
