"""The picture puts every label where it belongs, in radiological convention and at true proportions."""

from __future__ import annotations

import io
from itertools import permutations, product

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from models.manifest import Label
from models.volume import Labelmap, Reorientation, Volume
from service.overlay import draw_overlay, edge_letters, overlay_png

RED, GREEN = (255, 0, 0), (0, 255, 0)
CODES = ["".join(letters) for order in permutations(("LR", "PA", "SI")) for letters in product(*order)]


def label(value: int, name: str, color: tuple[int, int, int]) -> Label:
    concept = {"value": "1", "meaning": name}
    return Label.model_validate(
        {"value": value, "name": name, "category": concept, "type": concept, "color_rgb": color}
    )


LABELS = (label(1, "front", RED), label(2, "back", GREEN))


def head(spacing_xyz_mm: tuple[float, float, float] = (1.0, 1.0, 2.0)) -> tuple[Volume, Labelmap]:
    """An LPS grid (20, 40, 30): label 1 right, anterior and superior; label 2 left, posterior, inferior."""
    image = np.full((1, 20, 40, 30), 50, np.float32)
    labels = np.zeros((20, 40, 30), np.uint8)
    labels[11:15, 4:10, 3:8] = 1
    labels[8:12, 28:34, 20:26] = 2  # shares the slices 11 with label 1
    affine = np.diag([*spacing_xyz_mm, 1.0])
    return Volume(image, affine), Labelmap(labels, affine)


def places(picture: Image.Image, color: tuple[int, int, int]) -> list[tuple[float, float]]:
    """Centre (x, y) of the coloured outline in each of the three panels, in parts of the panel."""
    pixels = np.asarray(picture)[34:434].astype(int)  # below the title, above the legend
    third = picture.width / 3
    found = []
    for i in range(3):
        part = pixels[:, round(i * third) : round((i + 1) * third)]
        y, x = np.nonzero((part == color).all(axis=-1))
        found.append((x.mean() / part.shape[1], y.mean() / part.shape[0]) if x.size else (np.nan, np.nan))
    return found


def test_labels_stand_where_a_radiologist_looks_for_them() -> None:
    volume, labelmap = head()
    picture = draw_overlay(volume, labelmap, LABELS)
    (ax, ay), (_, cy), _ = places(picture, RED)
    (bx, by), (_, dy), _ = places(picture, GREEN)
    assert ax < bx  # the patient's right is on the left of the picture
    assert ay < by  # anterior is at the top of the axial plane
    coronal_red = places(draw_overlay(volume, only(labelmap, 1), LABELS), RED)[1]
    coronal_green = places(draw_overlay(volume, only(labelmap, 2), LABELS), GREEN)[1]
    assert coronal_red[1] < coronal_green[1]  # superior is at the top
    assert coronal_red[0] < coronal_green[0]
    sagittal_red = places(draw_overlay(volume, only(labelmap, 1), LABELS), RED)[2]
    sagittal_green = places(draw_overlay(volume, only(labelmap, 2), LABELS), GREEN)[2]
    assert sagittal_red[0] < sagittal_green[0]  # anterior is on the left of the sagittal plane
    assert sagittal_red[1] < sagittal_green[1]
    assert np.isfinite([cy, dy]).any()


def only(labelmap: Labelmap, value: int) -> Labelmap:
    return Labelmap(np.where(labelmap.array == value, value, 0).astype(np.uint8), labelmap.affine)


@pytest.mark.parametrize("code", CODES)
def test_the_orientation_of_the_array_changes_no_pixel(code: str) -> None:
    volume, labelmap = head()
    random = np.random.default_rng(0)
    volume.array[:] = random.integers(1, 200, volume.array.shape)
    change = Reorientation.between("LPS", code)
    affine = change.apply_affine(volume.affine, volume.shape_zyx)
    turned = draw_overlay(
        Volume(change.apply(volume.array), affine), Labelmap(change.apply(labelmap.array), affine), LABELS
    )
    assert np.array_equal(np.asarray(turned), np.asarray(draw_overlay(volume, labelmap, LABELS)))


def test_proportions_are_those_of_the_patient() -> None:
    volume, labelmap = head((1.0, 1.0, 4.0))  # 30 x 40 x 80 mm
    pixels = np.asarray(draw_overlay(volume, only(labelmap, 1), LABELS)).astype(int)
    coronal = pixels[34:434, :][(pixels[34:434, :] == RED).all(axis=-1).any(axis=1)]
    assert coronal.shape[0] == pytest.approx(4 * 4 * 400 / 80, abs=8)  # 4 slices of 4 mm, 5 pixels a mm


def test_of_the_slices_through_the_largest_structure_the_one_with_most_labels_is_shown() -> None:
    volume, labelmap = head()
    picture = np.asarray(draw_overlay(volume, labelmap, LABELS)).astype(int)
    axial = picture[34:434, : picture.shape[1] // 3]
    assert (axial == RED).all(axis=-1).any()
    assert (axial == GREEN).all(axis=-1).any()


def test_every_plane_goes_through_the_largest_structure() -> None:
    volume, labelmap = head()
    array = np.zeros_like(labelmap.array)
    array[9:17, 20:34, 15:27] = 1
    array[2:4, 4:6, 3:5] = 2  # alone in its slices, and with the other in none
    picture = draw_overlay(volume, Labelmap(array, labelmap.affine), LABELS)
    assert np.isfinite(places(picture, RED)).all()
    assert np.isnan(places(picture, GREEN)).all()
    touching = array.copy()
    touching[16, 2:8, 2:8] = 2  # many labels at the very end of the largest one do not draw the plane there
    touching[9:17, 20:34, 15:27] = 1
    touching[16, 20:34, 15:26] = 0
    picture = np.asarray(draw_overlay(volume, Labelmap(touching, labelmap.affine), LABELS)).astype(int)
    axial = picture[34:434, : picture.shape[1] // 3]
    assert not (axial == GREEN).all(axis=-1).any()


@pytest.mark.parametrize(
    ("direction", "letters"),
    [
        ((1, 0, 0), "L"),
        ((-1, 0, 0), "R"),
        ((0, 1, 0), "P"),
        ((0, 0, -1), "I"),
        ((0.98, 0.2, 0), "L"),
        ((0, -0.8, 0.6), "AS"),
        ((-0.6, 0.64, -0.48), "PRI"),
    ],
)
def test_an_edge_between_directions_has_the_letters_of_both(direction: tuple, letters: str) -> None:
    assert edge_letters(np.array(direction, float)) == letters


def test_an_oblique_image_has_its_own_letters_and_the_labels_at_the_same_ends() -> None:
    volume, labelmap = head()
    turned = turn((0.0, 0.0, 30.0)) @ volume.affine
    straight = np.asarray(draw_overlay(volume, labelmap, LABELS)).astype(int)
    oblique = np.asarray(draw_overlay(Volume(volume.array, turned), Labelmap(labelmap.array, turned), LABELS))
    (ax, ay), (bx, by) = (places(Image.fromarray(oblique), color)[0] for color in (RED, GREEN))
    assert ax < bx
    assert ay < by
    assert (np.abs(oblique.astype(int) - straight) > 100).any()  # letters and title


def turn(angles_degrees: tuple[float, float, float]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles_degrees, degrees=True).as_matrix()
    return matrix


def test_an_empty_labelmap_and_a_flat_image_still_give_a_picture() -> None:
    volume, labelmap = head()
    empty = Labelmap(np.zeros_like(labelmap.array), labelmap.affine)
    picture = np.asarray(draw_overlay(volume, empty, LABELS)).astype(int)
    assert not (picture == RED).all(axis=-1).any()


def test_png_is_the_same_picture_and_the_same_bytes_every_time() -> None:
    volume, labelmap = head()
    png = overlay_png(volume, labelmap, LABELS, title="hippocampus 1.0.0")
    assert png == overlay_png(volume, labelmap, LABELS, title="hippocampus 1.0.0")
    picture = draw_overlay(volume, labelmap, LABELS, title="hippocampus 1.0.0")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(picture))
