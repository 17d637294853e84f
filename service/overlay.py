"""A picture of a result: three planes through its largest structure, as a radiologist expects to see them.

The planes of the image that are nearest to axial, coronal and sagittal, at true proportions. Axial and
coronal planes are shown in radiological convention: the patient's right is on the left of the picture. The
sagittal plane has anterior on its left. Letters at the edges say so (R, L, A, P, S, I); an oblique plane says
that it is one, and has two or three letters where an edge lies between directions, the main one first. The
picture is for looking, never for diagnosis: it is made from 8-bit greys and says "unverified".
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from models.manifest import Label
from models.volume import Labelmap, Volume, reorient, spacing_xyz_mm

_PANEL_PIXELS = 400
_WINDOW_VOXELS = 4_000_000
_MARGIN = 28
_LEGEND_LINE = 24
_FILL = 0.35  # how much of the colour covers the image inside a label; its outline is opaque
_INK = (235, 235, 235)


@dataclass(frozen=True)
class _Plane:
    """One panel: ``axis`` of the (Z, Y, X) array that is fixed, and whether its rows run upwards.

    ``across`` and ``down`` are the voxel axes (x, y, z) along which its columns and rows run.
    """

    title: str
    axis: int
    upside_down: bool
    across: int
    down: int


# Arrays are in LPS here: x grows to the patient's left, y to posterior, z to superior, or nearly so.
_PLANES = (
    _Plane("axial", 0, False, 0, 1),
    _Plane("coronal", 1, True, 0, 2),
    _Plane("sagittal", 2, True, 1, 2),
)
_LETTERS = (("L", "R"), ("P", "A"), ("S", "I"))
_LEAST_PART = 0.25  # of a direction, to be worth a letter: 14 degrees off


def draw_overlay(
    volume: Volume, labelmap: Labelmap, labels: Sequence[Label], *, title: str = ""
) -> Image.Image:
    """Draw a labelmap over the first channel of its volume.

    Parameters
    ----------
    volume : Volume
        (C, Z, Y, X), in LPS millimetres.
    labelmap : Labelmap
        (Z, Y, X), on the grid of the volume.
    labels : sequence of Label
        What the values mean, and their colours.
    title : str
        One line above the planes; nothing that names a patient.
    """
    assert labelmap.array.shape == volume.shape_zyx
    image, change = reorient(volume, "LPS")
    labelled: NDArray[np.integer] = change.apply(labelmap.array)
    spacing_zyx_mm = spacing_xyz_mm(image.affine)[::-1]
    extents_mm = [n * s for n, s in zip(labelled.shape, spacing_zyx_mm, strict=True)]
    pixels_per_mm = _PANEL_PIXELS / max(extents_mm)
    low, high = _window(volume.array[0])
    colors = {label.value: label.color_rgb for label in labels}

    directions = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
    counts = np.bincount(labelmap.array.ravel())[1:]
    largest = int(np.argmax(counts)) + 1 if counts.any() else 0

    panels = []
    for plane in _PLANES:
        index = _best_index(labelled, plane.axis, largest)
        rows_mm, columns_mm = (extents_mm[a] for a in range(3) if a != plane.axis)
        size = (max(1, round(columns_mm * pixels_per_mm)), max(1, round(rows_mm * pixels_per_mm)))
        panels.append(
            _draw_panel(
                _windowed(np.moveaxis(image.array[0], plane.axis, 0)[index], low, high),
                np.moveaxis(labelled, plane.axis, 0)[index],
                size,
                plane,
                directions,
                colors,
            )
        )
    return _assemble(panels, labelmap.volumes_ml(), labels, title)


def overlay_png(volume: Volume, labelmap: Labelmap, labels: Sequence[Label], *, title: str = "") -> bytes:
    """The picture of :func:`draw_overlay` as a PNG file."""
    stream = io.BytesIO()
    draw_overlay(volume, labelmap, labels, title=title).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _window(intensities: NDArray[np.float32]) -> tuple[float, float]:
    """The 0.5th and the 99.5th percentile of what is not the minimum, of a part of a large volume."""
    step = max(1, math.ceil((intensities.size / _WINDOW_VOXELS) ** (1 / 3)))
    looked_at = intensities[::step, ::step, ::step]
    inside = looked_at[looked_at > looked_at.min()]
    low, high = np.percentile(inside, (0.5, 99.5)) if inside.size else (0.0, 1.0)
    return float(low), float(high)


def _windowed(intensities: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    """Grey values from 0 at ``low`` to 255 at ``high``."""
    scaled = (intensities - np.float32(low)) / np.float32(max(high - low, 1e-6))
    return np.asarray(np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def _best_index(labelled: NDArray[np.integer], axis: int, largest: int) -> int:
    """The slice along ``axis`` through the largest structure: of those where it has at least half of its
    greatest area the one with most labels, and of these the one where its area is greatest."""
    if not largest:
        return int(labelled.shape[axis]) // 2
    present, area = [], []
    for plane in np.moveaxis(labelled, axis, 0):  # np.take would copy the whole of a flipped array each time
        counts = np.bincount(plane.ravel(), minlength=largest + 1)
        present.append(np.count_nonzero(counts[1:]))
        area.append(int(counts[largest]))
    within = [i for i in range(len(area)) if 2 * area[i] >= max(area)]
    return max(within, key=lambda i: (present[i], area[i]))


def edge_letters(direction: NDArray[np.float64]) -> str:
    """The letters for an edge of a picture towards which this unit vector (LPS) points.

    >>> edge_letters(np.array([0.0, -0.8, 0.6]))
    'AS'
    """
    parts = sorted(range(3), key=lambda i: -abs(direction[i]))
    return "".join(_LETTERS[i][int(direction[i] < 0)] for i in parts if abs(direction[i]) > _LEAST_PART)


def _draw_panel(
    grey: NDArray[np.uint8],
    labelled: NDArray[np.integer],
    size: tuple[int, int],
    plane: _Plane,
    directions: NDArray[np.float64],
    colors: dict[int, tuple[int, int, int]],
) -> Image.Image:
    """One plane, (rows, columns) in, ``size`` (width, height) pixels out, plus a margin for its letters."""
    if plane.upside_down:  # rows grow to superior; a picture's rows grow downwards
        grey, labelled = grey[::-1], labelled[::-1]
    smooth = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC), np.float32)
    values = np.asarray(
        Image.fromarray(labelled.astype(np.int32)).resize(size, Image.Resampling.NEAREST), np.int32
    )
    rgb = np.repeat(smooth[..., None], 3, axis=-1)
    edge = _edges(values)
    for value, color in colors.items():
        inside = values == value
        rgb[inside] = (1 - _FILL) * rgb[inside] + _FILL * np.array(color, np.float32)
        rgb[inside & edge] = color
    panel = Image.new("RGB", (size[0] + 2 * _MARGIN, size[1] + 2 * _MARGIN))
    panel.paste(Image.fromarray(rgb.astype(np.uint8)), (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(panel)
    middle_x, middle_y = panel.width / 2, panel.height / 2
    across = directions[:, plane.across]
    down = directions[:, plane.down] * (-1 if plane.upside_down else 1)
    edges = [edge_letters(towards) for towards in (-across, across, -down, down)]
    for letters, x, y, anchor in (
        (edges[0], 4, middle_y, "lm"),
        (edges[1], panel.width - 4, middle_y, "rm"),
        (edges[2], middle_x, 3, "ma"),
        (edges[3], middle_x, panel.height - 3, "md"),
    ):
        draw.text((x, y), letters, fill=_INK, font=_font(15 if len(letters) < 3 else 11), anchor=anchor)
    oblique = any(len(letters) > 1 for letters in edges)
    title = f"{plane.title}, oblique" if oblique else plane.title
    draw.text((4, 3), title, fill=(150, 150, 150), font=_font(13), anchor="la")
    return panel


def _edges(values: NDArray[np.int32]) -> NDArray[np.bool_]:
    """(rows, columns) True where a pixel has a neighbour of another value; two pixels wide."""
    edge = np.zeros(values.shape, bool)
    vertical = values[1:] != values[:-1]
    horizontal = values[:, 1:] != values[:, :-1]
    edge[1:] |= vertical
    edge[:-1] |= vertical
    edge[:, 1:] |= horizontal
    edge[:, :-1] |= horizontal
    return edge


def _assemble(
    panels: Sequence[Image.Image], volumes_ml: dict[int, float], labels: Sequence[Label], title: str
) -> Image.Image:
    """The panels side by side, a title above, and the labels with their volumes below."""
    shown = [label for label in labels if label.value in volumes_ml]
    lines = max(1, -(-len(shown) // 3))
    head = 34
    width = max(sum(p.width for p in panels), 640)
    tallest = max(p.height for p in panels)
    sheet = Image.new("RGB", (width, head + tallest + lines * _LEGEND_LINE + 14))
    draw = ImageDraw.Draw(sheet)
    draw.text((10, 9), title or "segmentation", fill=_INK, font=_font(16), anchor="la")
    draw.text((width - 10, 9), "AI, unverified", fill=(255, 200, 90), font=_font(16), anchor="ra")
    left = (width - sum(p.width for p in panels)) // 2
    for panel in panels:
        sheet.paste(panel, (left, head + (tallest - panel.height) // 2))
        left += panel.width
    top = head + tallest + 4
    if not shown:
        draw.text((10, top), "no label found", fill=_INK, font=_font(15), anchor="la")
    for i, label in enumerate(shown):
        x = 10 + (i % 3) * (width - 20) // 3
        y = top + (i // 3) * _LEGEND_LINE
        draw.rectangle((x, y + 2, x + 14, y + 16), fill=label.color_rgb)
        text = f"{label.name}  {volumes_ml[label.value]:.2f} mL"
        draw.text((x + 22, y + 9), text, fill=_INK, font=_font(15), anchor="lm")
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
