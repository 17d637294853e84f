"""The channels of a model out of the files of one whole study, told apart by the rules of a route."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from service.archive import dicom_files
from service.headers import read_attributes
from service.routes import Route
from service.routing import SeriesFacts, choose_channels, takes, wanted_keywords

_SENDER = ("calling_ae_title", "called_ae_title")  # what files do not have


def channels_of_study(paths: Sequence[Path], route: Route) -> tuple[list[list[Path]], tuple[str, ...]]:
    """Sort the DICOM files of a study by the channels of a route.

    Parameters
    ----------
    paths : sequence of Path
        Files and folders; what is not DICOM in them is left out.
    route : Route
        With channels. Its conditions on AE titles do not count: files have no sender.

    Returns
    -------
    list of lists of Path
        The files of each channel, in the route's order.
    tuple of str
        The channels' names.

    Raises
    ------
    Refusal
        NOT_A_VOLUME without a DICOM file; UNREADABLE; MISSING_CHANNEL or AMBIGUOUS_CHANNEL, by name.
    """
    found, _ = dicom_files(paths)
    files: dict[tuple[str, str], list[Path]] = {}
    for path in found:
        values = read_attributes(path, ("StudyInstanceUID", "SeriesInstanceUID"))
        study, series = (values[key][0] if values[key] else "" for key in values)
        files.setdefault((study, series), []).append(path)
    of_files = route.model_copy(
        update={"match": {name: rule for name, rule in route.match.items() if name not in _SENDER}}
    )
    keywords = wanted_keywords([of_files])
    facts = {
        f"{study}/{series}": SeriesFacts(
            series_id=f"{study}/{series}",
            study_instance_uid=study,
            series_instance_uid=series,
            instances=len(members),
            attributes=read_attributes(members[0], keywords),
        )
        for (study, series), members in sorted(files.items())
    }
    chosen = choose_channels(of_files, [each for each in facts.values() if takes(of_files, each)])
    return (
        [files[each.study_instance_uid, each.series_instance_uid] for each in chosen.values()],
        tuple(chosen),
    )
