"""Logs: JSON lines, every library through one door, and no patient in them."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from models.errors import ReasonCode, Refusal
from service.logs import configure_logging, drop_patient_data, get_logger

NAME = "Schuster^Hannelore"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level, hook, show = root.handlers[:], root.level, sys.excepthook, warnings.showwarning
    stream = io.StringIO()
    configure_logging("INFO", component="receive", stream=stream, as_json=True)
    yield stream
    root.handlers[:], sys.excepthook, warnings.showwarning = handlers, hook, show
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_json_object_with_time_level_component_and_keys(stream: io.StringIO) -> None:
    get_logger("service.dicom.receive").info("instance.stored", instance_id="ab12", size_bytes=7)
    (line,) = lines(stream)
    assert line["event"] == "instance.stored"
    assert (line["instance_id"], line["size_bytes"]) == ("ab12", 7)
    assert (line["level"], line["component"]) == ("info", "receive")
    assert line["logger"] == "service.dicom.receive"
    assert line["timestamp"].endswith("Z")


def test_the_standard_library_comes_through_the_same_door(stream: io.StringIO) -> None:
    logging.getLogger("some.library").warning("disk %s is %d%% full", "sda", 91, extra={"mount": "/data"})
    (line,) = lines(stream)
    assert line["event"] == "disk sda is 91% full"
    assert line["component"] == "receive"
    assert line["mount"] == "/data"


@pytest.mark.parametrize(
    "key", ["patient_name", "PatientName", "PATIENT-ID", "patient_birth_date", "AccessionNumber", "api_key"]
)
def test_a_patient_key_is_dropped_at_any_depth(stream: io.StringIO, key: str) -> None:
    get_logger("x").info("event", **{key: NAME}, nested={"inner": {key: NAME}, "kept": 1})
    assert NAME not in stream.getvalue()
    assert lines(stream)[0]["nested"] == {"inner": {}, "kept": 1}


def test_the_original_of_a_nested_value_is_left_alone() -> None:
    nested = {"patient_name": NAME}
    assert drop_patient_data(None, "info", {"nested": nested}) == {"nested": {}}
    assert nested == {"patient_name": NAME}


def test_the_text_of_a_foreign_exception_stays_out_and_its_place_stays_in(stream: io.StringIO) -> None:
    def parse() -> None:
        raise ValueError(f"Invalid value for VR PN: {NAME}")

    try:
        parse()
    except ValueError:
        get_logger("x").exception("instance.unreadable")
        logging.getLogger("y").exception("instance.unreadable")
    assert NAME not in stream.getvalue()
    for line in lines(stream):
        assert line["error"]["type"] == "builtins.ValueError"
        assert line["error"]["at"][-1].endswith(" parse")


def test_the_text_of_our_own_errors_is_written_with_its_cause(stream: io.StringIO) -> None:
    try:
        try:
            raise OSError(28, "No space left on device", f"/data/{NAME}")
        except OSError as cause:
            raise Refusal(ReasonCode.MISSING_SLICE, "Slice 7 of 12 is missing.", remedy="Send it.") from cause
    except Refusal:
        get_logger("x").exception("job.refused")
    (line,) = lines(stream)
    assert line["error"]["message"] == "Slice 7 of 12 is missing."
    assert line["error"]["cause"] == line["error"]["cause"] | {"type": "builtins.OSError", "errno": 28}
    assert NAME not in stream.getvalue()


def test_a_library_that_logs_an_exception_as_its_message_gives_the_type_alone(stream: io.StringIO) -> None:
    logging.getLogger("some.library").error(ValueError(NAME))
    logging.getLogger("some.library").error("while decoding: %s", KeyError(NAME))
    assert NAME not in stream.getvalue()
    assert [line["event"] for line in lines(stream)] == [
        "ValueError in some.library",
        "KeyError in some.library",
    ]


def test_libraries_that_quote_data_sets_are_silent_and_the_chatty_ones_quiet(stream: io.StringIO) -> None:
    logging.getLogger("pydicom").error("Invalid value for PN: %s", NAME)
    logging.getLogger("pynetdicom.acse").error("Invalid value for PN: %s", NAME)
    logging.getLogger("uvicorn.error").info("Started server process")
    assert stream.getvalue() == ""
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    assert [line["event"] for line in lines(stream)] == ["Invalid HTTP request received."]


def test_a_warning_of_python_does_not_quote_its_text(stream: io.StringIO) -> None:
    logging.getLogger().setLevel("DEBUG")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        configure_logging("DEBUG", stream=stream, as_json=True)
        warnings.warn(f"value {NAME} breaks its VR", UserWarning, stacklevel=1)
    assert NAME not in stream.getvalue()
    assert lines(stream)[-1]["category"] == "UserWarning"


def test_an_exception_nobody_caught_is_a_line_without_its_text(stream: io.StringIO) -> None:
    try:
        raise RuntimeError(NAME)
    except RuntimeError as error:
        sys.excepthook(RuntimeError, error, error.__traceback__)
    (line,) = lines(stream)
    assert (line["event"], line["level"]) == ("uncaught", "critical")
    assert NAME not in stream.getvalue()


def test_readable_lines_without_json(stream: io.StringIO) -> None:
    configure_logging("INFO", stream=stream, as_json=False)
    get_logger("x").info("node.started", port=11112)
    assert "node.started" in stream.getvalue()
    assert "port=11112" in stream.getvalue()
