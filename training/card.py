"""The model card: what model.json says, for a person to read."""

from __future__ import annotations

from models.manifest import Manifest


def model_card(manifest: Manifest, notes: str = "") -> str:
    """A model card in Markdown, every figure of it from the manifest; ``notes`` go to the end."""
    parts = [
        f"# {manifest.title}",
        f"{manifest.name} {manifest.version}. Licence: {manifest.licence}.",
        "## Intended use",
        manifest.intended_use,
        "## Labels",
        _labels(manifest),
        "## Input",
        _input(manifest),
        "## How it was made",
        _provenance(manifest),
        "## Measured",
        _metrics(manifest),
    ]
    if notes.strip():
        parts.append(notes.strip())
    return "\n\n".join(parts) + "\n"


def _labels(manifest: Manifest) -> str:
    rows = ["| value | name | code | laterality | plausible volume (mL) |", "|---|---|---|---|---|"]
    for label in manifest.labels:
        code = f"{label.type.value} {label.type.scheme} {label.type.meaning}"
        volume = (
            "not stated" if label.volume_range_ml is None else "{:g} to {:g}".format(*label.volume_range_ml)
        )
        rows.append(
            f"| {label.value} | {label.name} | {code} | {label.laterality or 'not stated'} | {volume} |"
        )
    return "\n".join(rows)


def _input(manifest: Manifest) -> str:
    limits = manifest.input_limits
    channels = ", ".join(f"{c.name}{f' ({c.modality})' if c.modality else ''}" for c in manifest.channels)
    rows = [f"- Channels: {channels}", f"- Orientation of the training arrays: {manifest.orientation}"]
    if limits.modalities:
        rows.append(f"- Modalities: {', '.join(limits.modalities)}")
    if limits.spacing_mm is not None:
        rows.append("- Voxel spacing: {:g} to {:g} mm".format(*limits.spacing_mm))
    if limits.field_of_view_mm is not None:
        rows.append("- Field of view along each axis: {:g} to {:g} mm".format(*limits.field_of_view_mm))
    rows.append(f"- At least {limits.minimum_slices} slices")
    return "\n".join(rows)


def _provenance(manifest: Manifest) -> str:
    origin = manifest.provenance
    rows = [f"- Method: {origin.method}"]
    if origin.width is not None:
        rows.append(f"- Width: {origin.width} of the teacher's channels")
    if origin.recipe is not None:
        rows.append(f"- Recipe: {origin.recipe}")
    rows.append(f"- Training data: {origin.data}")
    rows.append(f"- Licence of the data: {origin.data_licence or 'not stated'}")
    if origin.teacher_digest is not None:
        rows.append(f"- Teacher: {origin.teacher_digest}")
    rows.append(
        f"- Patch {list(manifest.inference.patch_size)} at {list(manifest.preprocessing.spacing_mm)} mm"
    )
    rules = manifest.postprocessing
    if rules is not None:
        names = [label.name for label in manifest.labels if label.value in rules.largest_component_of_labels]
        what = ["all labels together"] * rules.largest_component_of_foreground + names
        rows.append(
            f"- Of these the largest connected component alone is kept: {', '.join(what)}; a result that so "
            f"loses more than {rules.maximum_removed_share:.0%} of its voxels is doubtful"
        )
    return "\n".join(rows)


def _metrics(manifest: Manifest) -> str:
    metrics = manifest.metrics
    if metrics is None:
        return "Nothing was measured for this version."
    names = [label.name for label in manifest.labels]
    rows = [f"| mean Dice | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for model, dice in metrics.dice.items():
        rows.append(f"| {model} | {' | '.join(f'{dice[n]:.4f}' if n in dice else '' for n in names)} |")
    return f"On {metrics.evaluated_on} ({metrics.cases} cases).\n\n" + "\n".join(rows)
