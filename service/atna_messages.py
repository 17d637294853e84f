"""Lines of the audit trail as audit messages of DICOM PS3.15 section A.5, in the frames of RFC 5424 and 5425.

A message says who did what, from where, with what outcome, and names studies by their Study Instance UID.
Nothing else of a patient is in it: the schema of section A.5.1 lets the patient be left out, and the
repository can tell the patient by the study.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from ipaddress import ip_address
from xml.etree import ElementTree as Xml

from service.records.tables import Event

_SUCCESS, _MINOR_FAILURE, _SERIOUS_FAILURE = "0", "4", "8"  # EventOutcomeIndicator
_FACILITY_SEVERITY = 10 * 8 + 5  # security and authorisation messages, notice (PS3.15 section A.6)
_MESSAGE_ID = "DICOM+RFC3881"
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_NO_TOKEN = re.compile(r"[^!-~]")

Code = tuple[str, str]

_APPLICATION = ("110150", "Application")
_SOURCE = ("110153", "Source Role ID")
_DESTINATION = ("110152", "Destination Role ID")

_LOG_USED = ("110101", "Audit Log Used")
_ACCESSED = ("110103", "DICOM Instances Accessed")
_TRANSFERRED = ("110104", "DICOM Instances Transferred")
_DELETED = ("110105", "DICOM Study Deleted")
_IMPORT = ("110107", "Import")
_ALERT = ("110113", "Security Alert")
_AUTHENTICATION = ("110114", "User Authentication")

_LOGIN = ("110122", "Login")
_LOGOUT = ("110123", "Logout")
_NODE_AUTHENTICATION = ("110126", "Node Authentication")
_SOFTWARE = ("110131", "Software Configuration")
_RESTRICTED = ("110132", "Use of Restricted Function")
_OBJECT_ATTRIBUTES = ("110135", "Object Security Attributes Changed")
_USER_ATTRIBUTES = ("110137", "User Security Attributes Changed")


@dataclass(frozen=True)
class _Form:
    """What a kind of line is in DICOM's terms; codes of PS3.16 context groups 400 and 401."""

    event: Code
    action: str  # C create, R read, U update, D delete, E execute
    type: Code | None = None


_FORMS = {
    "login": _Form(_AUTHENTICATION, "E", _LOGIN),
    "console.login": _Form(_AUTHENTICATION, "E", _LOGIN),
    "console.login_refused": _Form(_AUTHENTICATION, "E", _LOGIN),
    "logout": _Form(_AUTHENTICATION, "E", _LOGOUT),
    "key.created": _Form(_ALERT, "E", _USER_ATTRIBUTES),
    "key.revoked": _Form(_ALERT, "E", _USER_ATTRIBUTES),
    "person.known": _Form(_ALERT, "E", _USER_ATTRIBUTES),
    "access.refused": _Form(_ALERT, "E", _RESTRICTED),
    "association_rejected": _Form(_ALERT, "E", _NODE_AUTHENTICATION),
    "job.read": _Form(_ACCESSED, "R"),
    "result.read": _Form(_ACCESSED, "R"),
    "study.read": _Form(_ACCESSED, "R"),
    "segmentation.uploaded": _Form(_IMPORT, "C"),
    "delivery_sent": _Form(_TRANSFERRED, "R"),
    "study.deleted": _Form(_DELETED, "D"),
    "job.deleted": _Form(_DELETED, "D"),
    "audit.read": _Form(_LOG_USED, "R"),
    "audit.verified": _Form(_LOG_USED, "R"),
    "audit.broken": _Form(_ALERT, "E", _OBJECT_ATTRIBUTES),
}
_PREFIXES = {"model.": _Form(_ALERT, "E", _SOFTWARE)}


def audit_message(row: Event, *, source_id: str, site_id: str, node_address: str) -> bytes | None:
    """The audit message of a line, XML in UTF-8; None for lines that tell of no act of anybody.

    Parameters
    ----------
    source_id, site_id : str
        AuditSourceID and AuditEnterpriseSiteID: what the site calls this node, and itself.
    node_address : str
        Name or address of this machine.
    """
    form = _FORMS.get(row.kind) or next((f for p, f in _PREFIXES.items() if row.kind.startswith(p)), None)
    if form is None:
        return None
    message = Xml.Element("AuditMessage")
    event = Xml.SubElement(
        message,
        "EventIdentification",
        EventActionCode=form.action,
        EventDateTime=f"{row.at.isoformat(timespec='milliseconds')}Z",
        EventOutcomeIndicator=_outcome(row),
    )
    _code(event, "EventID", form.event)
    if form.type is not None:
        _code(event, "EventTypeCode", form.type)
    transferred = form.event is _TRANSFERRED
    _participant(message, source_id, node_address, is_requestor=transferred, role=_role_of_node(form))
    if transferred:
        _participant(message, str(row.detail.get("destination") or row.actor), "", False, _DESTINATION)
    else:
        _participant(message, row.actor or "unknown", row.origin, True, None)
    source = Xml.SubElement(message, "AuditSourceIdentification", AuditSourceID=source_id)
    if site_id:
        source.set("AuditEnterpriseSiteID", site_id)
    if row.subject:
        _object(message, row.subject)
    written: bytes = Xml.tostring(message, encoding="UTF-8", xml_declaration=True)
    return written


def syslog_frame(message: bytes, *, at: datetime, host: str, process: int) -> bytes:
    """A message with its syslog header (RFC 5424), after its length in octets (RFC 5425 section 4.3)."""
    when = f"{at.isoformat(timespec='milliseconds')}Z"
    name = _NO_TOKEN.sub("-", host)[:255] or "-"
    head = f"<{_FACILITY_SEVERITY}>1 {when} {name} segnode {process} {_MESSAGE_ID} - "
    content = head.encode("ascii") + b"\xef\xbb\xbf" + message
    return f"{len(content)} ".encode("ascii") + content


def _outcome(row: Event) -> str:
    if row.outcome == "success" and row.kind != "console.login_refused":
        return _SUCCESS
    return _SERIOUS_FAILURE if row.alert else _MINOR_FAILURE


def _role_of_node(form: _Form) -> Code:
    return {_TRANSFERRED: _SOURCE, _IMPORT: _DESTINATION}.get(form.event, _APPLICATION)


def _participant(
    message: Xml.Element, user_id: str, address: str, is_requestor: bool, role: Code | None
) -> None:
    participant = Xml.SubElement(
        message,
        "ActiveParticipant",
        UserID=_printable(user_id),
        UserIsRequestor="true" if is_requestor else "false",
    )
    if address:
        participant.set("NetworkAccessPointID", _printable(address))
        participant.set("NetworkAccessPointTypeCode", "2" if _is_address(address) else "1")
    if role is not None:
        _code(participant, "RoleIDCode", role)


def _object(message: Xml.Element, subject: str) -> None:
    is_study = _UID.fullmatch(subject) is not None
    attributes = {"ParticipantObjectID": _printable(subject), "ParticipantObjectTypeCode": "2"}
    attributes["ParticipantObjectTypeCodeRole"] = "3" if is_study else "4"  # report; resource
    found = Xml.SubElement(message, "ParticipantObjectIdentification", attributes)
    code = ("110180", "Study Instance UID") if is_study else ("12", "URI")
    _code(found, "ParticipantObjectIDTypeCode", code, "DCM" if is_study else "RFC-3881")


def _code(parent: Xml.Element, name: str, code: Code, system: str = "DCM") -> None:
    attributes = {"csd-code": code[0], "codeSystemName": system, "originalText": code[1]}
    Xml.SubElement(parent, name, attributes)


def _printable(text: str) -> str:
    """The text without characters that XML does not know."""
    return "".join(each for each in text if each.isprintable())


def _is_address(text: str) -> bool:
    try:
        ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return True
