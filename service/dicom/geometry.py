"""From planes in the patient to one regular grid, or the reason why there is none.

All places are LPS millimetres. The normal is row x column (PS3.3 C.7.6.2.1.1); slices are ordered by
their position along it, never by Instance Number, file name or SliceLocation, and the distance between
them is measured between positions, never taken from SliceThickness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.errors import ReasonCode, Refusal
from models.volume import Affine
from service.dicom.frames import Frame
from service.dicom.traits import text_of, trait
from service.dicom.volumes import refuse_interleaved, separating_traits, told_apart

_Floats = NDArray[np.float64]
_LISTED = 5  # places named in one sentence


@dataclass(frozen=True)
class GeometryPolicy:
    """What counts as one regular volume.

    Parameters
    ----------
    orientation_degrees : float
        Largest angle between the planes of two slices. 0.05 degrees move a pixel by 0.2 mm at 250 mm.
    tilt_degrees : float
        Largest angle between the line through the slice origins and the normal. Oblique MR is not tilted:
        there the whole stack is turned, and the angle is 0.
    spacing_fraction : float
        Largest distance of a slice from its place on the regular grid, as a fraction of the spacing ...
    spacing_mm : float
        ... and in millimetres; the smaller counts. Positions rounded to 0.1 mm are within both where the
        spacing is 1 mm or more.
    in_plane_mm : float
        Largest sideways distance of a slice from the straight line that fits all of them best, and of that
        line's end from the normal through its origin before the stack counts as tilted.
    duplicate_mm : float
        Slices closer than this lie at the same place.
    pixel_spacing_fraction : float
        Largest relative difference of pixel spacing between slices.
    minimum_slices : int
        Fewer are no volume: with two slices a missing one could not be seen.
    limit_voxels : int
        Largest number of voxels decoded; 1024 slices of 1024 x 1024.
    limit_frames : int
        Largest number of frames of one object.
    limit_inflated_bytes : int
        Largest size of one deflated data set once inflated.
    gantry_tilt : "refuse" or "accept"
        What to do with a tilted stack. One that is accepted gives a sheared affine.
    largest_tilt_degrees : float
        What is sheared further was not made by a gantry, and is refused in any case.
    non_image : "ignore" or "refuse"
        What to do with objects in the series that hold no plane of the patient.
    missing_identity : "refuse" or "accept"
        Accepting serves anonymised uploads whose result is a NIfTI file; no DICOM object is made of them.
    """

    orientation_degrees: float = 0.05
    tilt_degrees: float = 0.1
    spacing_fraction: float = 0.1
    spacing_mm: float = 0.1
    in_plane_mm: float = 0.1
    duplicate_mm: float = 0.01
    pixel_spacing_fraction: float = 1e-3
    minimum_slices: int = 3
    limit_voxels: int = 1 << 30
    limit_frames: int = 20_000
    limit_inflated_bytes: int = 1 << 31
    gantry_tilt: Literal["refuse", "accept"] = "refuse"
    largest_tilt_degrees: float = 45.0
    non_image: Literal["ignore", "refuse"] = "ignore"
    missing_identity: Literal["refuse", "accept"] = "refuse"


@dataclass(frozen=True, eq=False)
class Grid:
    """The frames in the order of increasing position along the normal, and the (4, 4) LPS affine.

    ``tilt_degrees`` is 0 but for a sheared stack.
    """

    frames: tuple[Frame, ...]
    affine: Affine
    shape_zyx: tuple[int, int, int]
    tilt_degrees: float = 0.0


def regular_grid(
    frames: Sequence[Frame], shapes_yx: Sequence[tuple[int, int]], policy: GeometryPolicy
) -> Grid:
    """Order the frames and fit the grid that they lie on.

    Raises
    ------
    Refusal
        INVALID_GEOMETRY, MIXED_ORIENTATION, NOT_A_VOLUME, MULTI_VOLUME, DUPLICATE_POSITIONS, GANTRY_TILT,
        MISSING_SLICE or VARYING_SPACING, with the figures.
    """
    if not frames:
        raise _not_a_volume("The series holds no image that states its place in the patient.")
    row, column, normal = _directions(frames, policy)
    rows, columns = _one_matrix(shapes_yx)
    between_rows, between_columns = _one_pixel_spacing(frames, policy)

    positions = np.array([frame.position_mm for frame in frames])  # (N, 3) mm
    along = positions @ normal  # (N,) mm
    order = np.argsort(along, kind="stable")
    frames = [frames[i] for i in order]
    positions, along = positions[order], along[order]
    _refuse_repeated(frames, along, policy)
    if len(frames) < policy.minimum_slices:
        some = "1 image" if len(frames) == 1 else f"{len(frames)} images"
        raise _not_a_volume(f"The series holds {some}; a volume needs at least {policy.minimum_slices}.")

    origin, step = _straight_line(positions)
    tilt_degrees = _tilt_degrees(frames, step, along, normal, policy)
    offset = positions - (origin + np.arange(len(frames))[:, None] * step)
    _refuse_irregular(frames, along, offset @ normal, policy)
    sideways = float(np.linalg.norm(offset - np.outer(offset @ normal, normal), axis=1).max())
    if sideways > policy.in_plane_mm:
        raise Refusal(
            ReasonCode.INVALID_GEOMETRY,
            f"Slices are shifted sideways by up to {sideways:.2f} mm from the straight line that fits best.",
            remedy="Send a series that was reconstructed as one straight stack.",
        )

    refuse_interleaved(frames)
    affine = np.eye(4)
    affine[:3, 0] = row * between_columns
    affine[:3, 1] = column * between_rows
    affine[:3, 2] = step
    affine[:3, 3] = origin
    return Grid(tuple(frames), affine, (len(frames), rows, columns), tilt_degrees)


def _straight_line(positions: _Floats) -> tuple[_Floats, _Floats]:
    """Origin and step of the equidistant points that lie nearest to the positions, by least squares.

    First and last position alone would hand their own rounding on to all that lie between them.
    """
    offsets = positions - positions[0]  # what all have in common stays exact
    index = np.arange(len(positions)) - (len(positions) - 1) / 2
    step = index @ offsets / (index @ index)
    return positions[0] + offsets.mean(axis=0) + index[0] * step, step


def _directions(frames: Sequence[Frame], policy: GeometryPolicy) -> tuple[_Floats, _Floats, _Floats]:
    """Unit vectors along increasing column index, increasing row index, and their normal."""
    rows = np.array([frame.row for frame in frames])
    columns = np.array([frame.column for frame in frames])
    lengths = np.linalg.norm(np.concatenate([rows, columns]), axis=1)
    skew = np.abs(np.sum(rows * columns, axis=1))
    if np.abs(lengths - 1).max() > 0.01 or skew.max() > 0.01:
        worst = int(np.argmax(skew))
        a, b = np.linalg.norm(rows[worst]), np.linalg.norm(columns[worst])
        raise Refusal(
            ReasonCode.INVALID_GEOMETRY,
            "The row and column directions are not two unit vectors at a right angle "
            f"({frames[worst].label}: lengths {a:.3f} and {b:.3f}, cosine {skew[worst]:.3f}).",
            remedy="Send the study again from its original source.",
        )
    angle = max(_largest_angle_degrees(rows), _largest_angle_degrees(columns))
    if angle > policy.orientation_degrees:
        kinds, group = np.unique(np.round(np.hstack([rows, columns]), 2), axis=0, return_inverse=True)
        by = separating_traits(frames, group.tolist())
        raise Refusal(
            ReasonCode.MIXED_ORIENTATION,
            f"The images lie in {max(len(kinds), 2)} orientations that differ by up to {angle:.1f} degrees, "
            f"as those of a localizer do{', told apart by ' + ' or by '.join(by) if by else ''}.",
            remedy="Route a series whose slices are parallel"
            + (f", or have the route take one stack (volume: {{by: {by[0]}, equals: ...}})." if by else "."),
        )
    row = rows[0] / np.linalg.norm(rows[0])
    normal = np.cross(row, columns[0])
    normal /= np.linalg.norm(normal)
    return row, np.cross(normal, row), normal


def _largest_angle_degrees(vectors: _Floats) -> float:
    """Largest angle to the first vector; by the sine, which unlike the cosine resolves small angles."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    sines = np.linalg.norm(np.cross(unit[0], unit), axis=1)
    return float(np.degrees(np.arctan2(sines, unit @ unit[0]).max()))


def _one_matrix(shapes_yx: Sequence[tuple[int, int]]) -> tuple[int, int]:
    shapes = sorted(set(shapes_yx))
    if len(shapes) > 1:
        sizes = ", ".join(f"{y} x {x}" for y, x in shapes[:_LISTED])
        raise _not_a_volume(f"The images have {len(shapes)} different matrix sizes ({sizes}).")
    return shapes[0]


def _one_pixel_spacing(frames: Sequence[Frame], policy: GeometryPolicy) -> tuple[float, float]:
    spacings = np.array([frame.pixel_spacing_mm for frame in frames])
    if spacings.min() <= 0:
        raise Refusal(
            ReasonCode.INVALID_GEOMETRY,
            f"The pixel spacing is {spacings.min():g} mm; it must be positive.",
            remedy="Send the study again from its original source.",
        )
    spread = float((np.ptp(spacings, axis=0) / spacings[0]).max())
    if spread > policy.pixel_spacing_fraction:
        raise _not_a_volume(
            f"The pixel spacing differs between images, from {spacings.min():.4f} to {spacings.max():.4f} mm."
        )
    return float(spacings[0, 0]), float(spacings[0, 1])


def _refuse_repeated(frames: Sequence[Frame], along: _Floats, policy: GeometryPolicy) -> None:
    starts = np.flatnonzero(np.diff(along, prepend=-np.inf) > policy.duplicate_mm)
    counts = np.diff(np.append(starts, len(along)))
    if counts.max() == 1:
        return
    by = told_apart(frames, np.repeat(np.arange(len(starts)), counts), len(starts))
    if len(starts) == 1:
        raise _not_a_volume(f"All {len(frames)} images lie at one position ({along[0]:.2f} mm){by}.")
    if counts.min() == counts.max():
        raise Refusal(
            ReasonCode.MULTI_VOLUME,
            f"The series holds {counts[0]} images at each of {len(starts)} positions{by}.",
            remedy="Route a series that holds one volume (one phase, echo, time point or contrast), or have "
            "the route take one of them (volume: {by: ..., take: first}).",
        )
    places = ", ".join(f"{along[s]:.2f}" for s in starts[counts > 1][:_LISTED])
    raise Refusal(
        ReasonCode.DUPLICATE_POSITIONS,
        f"{int((counts > 1).sum())} of {len(starts)} positions hold more than one image ({places} mm"
        f"{' and others' if (counts > 1).sum() > _LISTED else ''}){by}.",
        remedy="Route a series with one image at every position"
        + (", have the route take one volume (volume: {by: ..., take: first})," if by else ",")
        + " or remove the repeated images.",
    )


def _tilt_degrees(
    frames: Sequence[Frame], step: _Floats, along: _Floats, normal: _Floats, policy: GeometryPolicy
) -> float:
    """The angle between the normal and the line through the slices; 0 where it is within tolerance."""
    run = step * (len(frames) - 1)
    height = run @ normal
    sideways_mm = float(np.linalg.norm(run - height * normal))
    angle = float(np.degrees(np.arctan2(sideways_mm, height)))
    if angle <= policy.tilt_degrees or sideways_mm <= policy.in_plane_mm:  # so much is made by rounding
        return 0.0
    if policy.gantry_tilt == "refuse" or angle > policy.largest_tilt_degrees:
        gaps = _missing_places(along, policy)
        also = f" Besides, slices are missing at {len(gaps)} places." if gaps else ""
        raise Refusal(
            ReasonCode.GANTRY_TILT,
            f"The stack of {len(frames)} slices is sheared: gantry tilt {angle:.1f} degrees.{also}",
            remedy="Send a reconstruction without gantry tilt."
            if angle > policy.largest_tilt_degrees
            else "Send a reconstruction without gantry tilt, or have it resampled (gantry_tilt: resample).",
        )
    return angle


def _refuse_irregular(
    frames: Sequence[Frame], along: _Floats, off_grid: _Floats, policy: GeometryPolicy
) -> None:
    count = len(along)
    spacing = float(along[-1] - along[0]) / (count - 1)
    if float(np.abs(off_grid).max()) <= min(policy.spacing_fraction * spacing, policy.spacing_mm):
        return
    stacks = {trait(frame, "StackID") for frame in frames}
    if len(stacks) > 1:
        raise Refusal(
            ReasonCode.VARYING_SPACING,
            f"The images state {len(stacks)} stacks, and together they are not equidistant: the distance "
            f"varies from {np.diff(along).min():.3f} to {np.diff(along).max():.3f} mm.",
            remedy="Send a series of one stack, or have the route take one (volume: {by: StackID, equals: "
            f"'{min(text_of(stack) for stack in stacks if stack)}'}}).",
        )
    missing = _missing_places(along, policy)
    if missing:
        places = ", ".join(f"{place:.2f}" for place in missing[:_LISTED])
        some = "1 slice is" if len(missing) == 1 else f"{len(missing)} slices are"
        raise Refusal(
            ReasonCode.MISSING_SLICE,
            f"{some} missing from a stack of {count} with {np.diff(along).min():.3f} mm spacing, "
            f"at {places} mm along the normal{' and elsewhere' if len(missing) > _LISTED else ''}.",
            remedy="Send the whole series again.",
        )
    gaps = np.diff(along)
    raise Refusal(
        ReasonCode.VARYING_SPACING,
        f"The distance between slices varies from {gaps.min():.3f} to {gaps.max():.3f} mm.",
        remedy="Send a series with equidistant slices.",
    )


def _missing_places(along: _Floats, policy: GeometryPolicy) -> list[float]:
    """Positions in mm where slices are missing; none unless every gap is a whole multiple of the smallest
    and most gaps are the smallest itself (otherwise the spacing merely varies)."""
    gaps = np.diff(along)
    base = float(np.median(gaps[gaps < 1.5 * gaps.min()]))
    multiples = np.rint(gaps / base).astype(int)
    if np.abs(gaps - multiples * base).max() > policy.spacing_fraction * base:
        return []
    if 2 * int((multiples > 1).sum()) > len(gaps):
        return []
    return [
        float(start + k * base)
        for start, multiple in zip(along[:-1], multiples, strict=True)
        for k in range(1, int(multiple))
    ]


def _not_a_volume(sentence: str) -> Refusal:
    return Refusal(
        ReasonCode.NOT_A_VOLUME, sentence, remedy="Route a series that holds one stack of parallel slices."
    )
