"""Whether two versions of a model mean the same, and which of two is newer."""

from __future__ import annotations

from models.manifest import Channel, CodedConcept, Label, Manifest


def meaning_changes(old: Manifest, new: Manifest) -> list[str]:
    """What a reader of the results, or a sender of studies, would notice: labels, channels, orientation.

    Each difference is a short phrase about the new version; none means that one can replace the other.
    Colours, titles, weights and preprocessing may differ freely.
    """
    changes = []
    old_labels = {label.value: label for label in old.labels}
    new_labels = {label.value: label for label in new.labels}
    for value in sorted(old_labels.keys() | new_labels.keys()):
        before, after = old_labels.get(value), new_labels.get(value)
        if after is None:
            changes.append(f"label {value} ({_label(before)}) is gone")
        elif before is None:
            changes.append(f"label {value} ({_label(after)}) is new")
        elif _label(before) != _label(after):
            changes.append(f"label {value} is {_label(after)}, not {_label(before)}")
    before_channels, after_channels = list(map(_channel, old.channels)), list(map(_channel, new.channels))
    if before_channels != after_channels:
        changes.append(f"the channels are {', '.join(after_channels)}, not {', '.join(before_channels)}")
    if old.orientation != new.orientation:
        changes.append(f"the orientation is {new.orientation}, not {old.orientation}")
    return changes


def same_label(one: Label, other: Label) -> bool:
    """True if two labels mean the same: name, codes and side. Their values and colours may differ."""
    return _label(one) == _label(other)


def version_key(version: str) -> tuple[tuple[int, ...], bool, tuple[tuple[bool, int, str], ...]]:
    """A key that sorts semantic versions by precedence (Semantic Versioning 2.0.0, section 11).

    >>> sorted(["1.10.0", "1.9.0", "1.10.0-rc.2", "1.10.0-rc.10", "1.10.0-1"], key=version_key)
    ['1.9.0', '1.10.0-1', '1.10.0-rc.2', '1.10.0-rc.10', '1.10.0']
    """
    core, _, prerelease = version.partition("-")
    identifiers = tuple(
        (False, int(part), "") if part.isdecimal() else (True, 0, part) for part in prerelease.split(".")
    )
    return tuple(map(int, core.split("."))), not prerelease, identifiers


def _label(label: Label | None) -> str:
    assert label is not None
    side = f", {label.laterality}" if label.laterality else ""
    return f"{label.name!r} [{_code(label.category)}, {_code(label.type)}{side}]"


def _channel(channel: Channel) -> str:
    return f"{channel.name!r}{f' [{channel.modality}]' if channel.modality else ''}"


def _code(concept: CodedConcept) -> str:
    return f"{concept.scheme} {concept.value}"
