"""The tables of a brain bundle on real scans, as Markdown: what `real_scans` and `consistency` measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.bundle import Bundle
from models.manifest import Label, Laterality
from training.errors import TrainingDataError
from training.synthesis.plausible import PUBLISHED, SYMMETRIC_WITHIN, is_published

BEGIN, END = "<!-- real scans: begin -->", "<!-- real scans: end -->"


def report(
    labels: Sequence[Label],
    scans: Mapping[str, Any],
    consistency: Mapping[str, Any] | None = None,
    atlas: Mapping[str, Any] | None = None,
) -> str:
    """Volumes and asymmetry beside what is plausible, agreement with tissue maps, and repeated acquisitions.

    Parameters
    ----------
    scans, consistency, atlas : mapping
        As ``scans.json``, ``consistency.json`` and ``atlas.json`` hold them.
    """
    measured = scans["scans"]
    parts = [
        "Volumes in mL, left / right; a published range is of each side. **Bold**: outside of the published "
        "range, or of the bundle's own where none is given; *italic*: the sides differ by more than the "
        "label maps' (three standard deviations).",
        _volumes(labels, measured),
        _sources(),
        _scans(measured),
    ]
    dice = scans.get("icbm152_tissue_dice")
    if dice is not None:
        parts.append(
            f"ICBM152, Dice with its own tissue maps where they are over one half: cortex and deep grey "
            f"{dice['grey']:.3f}, white matter {dice['white']:.3f}."
        )
    if atlas is not None:
        parts.append(_atlas(labels, atlas))
    if consistency is not None:
        parts.append(_acquisitions(consistency))
    return "\n\n".join(parts)


def into(document: str, text: str) -> str:
    """A document with what stands between its marks replaced.

    Raises
    ------
    TrainingDataError
        If the document has no marks.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise TrainingDataError(f"The document has no {BEGIN} ... {END}.")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def _volumes(labels: Sequence[Label], measured: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"| | bundle's range | published | {' | '.join(one['scan'] for one in measured)} |",
        f"|---|---|---|{'---|' * len(measured)}",
    ]
    by_name = {label.name: label for label in labels}
    for label in labels:
        if label.laterality is Laterality.RIGHT:
            continue
        pair = [label]
        name = label.name
        if label.laterality is Laterality.LEFT:
            pair.append(by_name[label.name.replace("Left", "Right", 1)])
            name = label.name.removeprefix("Left ")
        own = " / ".join(_range(each.volume_range_ml) for each in pair)
        known = PUBLISHED.get(name)
        published = "" if known is None else _range((known.low_ml, known.high_ml))
        cells = [_cell(name, pair, one) for one in measured]
        rows.append(f"| {name} | {own} | {published} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(name: str, pair: Sequence[Label], one: Mapping[str, Any]) -> str:
    volumes = [one["volumes_ml"][each.name] for each in pair]
    fine = is_published(name, *volumes)
    if fine is None:
        fine = not any(each.name in one["outside"] for each in pair)
    text = " / ".join(f"{volume:.3g}" for volume in volumes)
    if len(volumes) == 2 and abs(one["asymmetry"][name]) > SYMMETRIC_WITHIN.get(name, 2.0):
        text = f"*{text}*"
    return text if fine else f"**{text}**"


def _sources() -> str:
    sources: dict[str, list[str]] = {}
    for name, known in PUBLISHED.items():
        sources.setdefault(known.source, []).append(name)
    lines = [f"- {', '.join(names)}: {source}" for source, names in sources.items()]
    return "\n".join(["Published ranges are of:", "", *lines])


def _scans(measured: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        "| scan | voxels | mm | seconds | outside of the bundle's ranges | left out as islands |",
        "|---|---|---|---|---|---|",
    ]
    for one in measured:
        voxels, mm = ("x".join(f"{n:g}" for n in one[key][::order]) for key, order in _GRID)
        rows.append(
            f"| {one['scan']} | {voxels} | {mm} | {one['seconds']:g} | "
            f"{len(one['outside'])} of {len(one['volumes_ml'])} | {_islands(one)} |"
        )
    return "\n".join(rows)


_GRID = (("shape_zyx", -1), ("spacing_mm", 1))  # both told as x, y, z


def _atlas(labels: Sequence[Label], atlas: Mapping[str, Any]) -> str:
    found = atlas["structures"]
    rows = [
        f"{atlas['scan']} beside {atlas['atlas']}: mean Dice {atlas['mean_dice']:.3f} of "
        f"{len(found)} structures (volumes in mL, left / right).",
        "",
        "| | Dice | volume | atlas |",
        "|---|---|---|---|",
    ]
    for label in labels:
        if label.laterality is Laterality.RIGHT or label.name not in found:
            continue
        names = [label.name]
        if label.laterality is Laterality.LEFT:
            names.append(label.name.replace("Left", "Right", 1))
        sides = [found[name] for name in names if name in found]
        dice, volume, theirs = (
            " / ".join(format(side[key], style) for side in sides)
            for key, style in (("dice", ".2f"), ("volume_ml", ".3g"), ("atlas_ml", ".3g"))
        )
        rows.append(f"| {label.name.removeprefix('Left ')} | {dice} | {volume} | {theirs} |")
    return "\n".join(rows)


def _islands(one: Mapping[str, Any]) -> str:
    return f"{one['islands']}: {one['removed_ml']:.3g} mL" if one.get("islands") else "none"


def _acquisitions(consistency: Mapping[str, Any]) -> str:
    names = [name for name in consistency["volumes_ml"] if name != consistency["reference"]]
    rows = [
        f"| largest difference from {consistency['reference']} | tolerance | {' | '.join(names)} | |",
        f"|---|---|{'---|' * len(names)}---|",
    ]
    reference = consistency["volumes_ml"][consistency["reference"]]
    for label, wanted in reference.items():
        tolerance = consistency["tolerance"][label]
        cells = []
        for name in names:
            volume = consistency["volumes_ml"][name][label]
            cells.append(f"{(volume - wanted) / wanted:+.1%}" if wanted else f"{volume:.3g} mL")
        verdict = "beyond" if label in consistency["beyond_tolerance"] else ""
        rows.append(f"| {label} ({wanted:.3g} mL) | {tolerance:.0%} | {' | '.join(cells)} | {verdict} |")
    beyond = len(consistency["beyond_tolerance"])
    rows += ["", f"{len(reference) - beyond} of {len(reference)} structures stay within their tolerance."]
    return "\n".join(rows)


def _range(limits: tuple[float, float] | None) -> str:
    return "" if limits is None else f"{limits[0]:.3g} to {limits[1]:.3g}"


def main() -> None:
    """Command line: ``python -m training.synthesis.scan_report BUNDLE FOLDER README.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "folder", type=Path, help="with scans.json, and consistency.json and atlas.json if there"
    )
    parser.add_argument("markdown", type=Path, help="a document whose marked part is replaced")
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    scans = json.loads((arguments.folder / "scans.json").read_text())
    paths = [arguments.folder / name for name in ("consistency.json", "atlas.json")]
    consistency, atlas = (json.loads(path.read_text()) if path.exists() else None for path in paths)
    for each in (scans, consistency, atlas):
        if each is not None and each["bundle_digest"] != bundle.digest:
            raise TrainingDataError("The figures are of another bundle.", remedy="Measure this one.")
    text = report(bundle.manifest.labels, scans, consistency, atlas)
    document: str = arguments.markdown.read_text(encoding="utf-8")
    arguments.markdown.write_text(into(document, text), encoding="utf-8")


if __name__ == "__main__":
    main()
