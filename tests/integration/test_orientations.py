"""One phantom of known shape, scanned in every orientation: through the node and back, it is the same.

Four balls of unequal size, which no mirror image of theirs covers, lie where they lie in the patient. Every
scan goes in over C-STORE, as single slices or as one multi-frame object; what the node sends to a storage SCP
is decoded by highdicom, and for some by dcmqi, and placed in patient coordinates. The model is a threshold,
so that every deviation is the node's.
"""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
import SimpleITK
from bundle_factory import make_threshold_bundle
from numpy.typing import NDArray
from phantom import test_uid as make_uid
from phantom import write_classic_series, write_enhanced_series
from programs import program
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.uid import ImplicitVRLittleEndian
from running_node import ROUTE, RunningNode
from storage_scp import StorageScp, StoredObject
from waiting import wait_until

from models.registry import Registry
from models.volume import Affine, axis_codes

SPACING_LPS_MM = np.array([1.0, 1.25, 1.6])  # of the voxel axis nearest to x, to y and to z of the patient
EXTENT_MM, OBLIQUE_EXTENT_MM = 48.0, 64.0  # that no ball is cut by the edge of the field of view
CENTRES_MM = np.array([(-12, -12, -12), (12, -10, -9), (-10, 11, -8), (8, 9, 12)], float)
RADII_MM = np.array([10.0, 9.0, 8.5, 10.5])
ISOCENTRE_MM = np.array([31.0, -44.0, 507.0])  # far from zero, as a table position is
STORED = (100, 300, 500, 700)
LABELS = ("first", "second", "third", "fourth")

_CODES = [
    first + second + third
    for pairs in (("LR", "PA", "SI"), ("LR", "SI", "PA"), ("PA", "LR", "SI"))
    for turned in (pairs, pairs[::-1])
    for first in turned[0]
    for second in turned[1]
    for third in turned[2]
]
_OBLIQUE = {
    "oblique-LPS": ("LPS", (11.0, -23.0, 37.0)),
    "oblique-PIR": ("PIR", (-14.0, 9.0, 21.0)),
    "oblique-SLA": ("SLA", (27.0, 31.0, -18.0)),
    "oblique-RAS": ("RAS", (-8.0, -38.0, 5.0)),
    "oblique-IPL": ("IPL", (33.0, 12.0, -29.0)),
    "oblique-ASR": ("ASR", (19.0, -16.0, 24.0)),
}
SCANS = [*_CODES, *_OBLIQUE]


def turn(angles_degrees: tuple[float, float, float]) -> NDArray[np.float64]:
    """The rotation about the patient's x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(angles_degrees)):
        i, j = ((1, 2), (2, 0), (0, 1))[axis]
        one = np.eye(3)
        one[i, i] = one[j, j] = np.cos(angle)
        one[i, j], one[j, i] = -np.sin(angle), np.sin(angle)
        matrix = one @ matrix
    return matrix


def scan_grid(name: str) -> tuple[tuple[int, int, int], Affine]:
    """Shape (Z, Y, X) and LPS affine of one scan, its centre a fraction of a voxel off the phantom's."""
    code, angles = _OBLIQUE.get(name, (name, (0.0, 0.0, 0.0)))
    extent_mm = OBLIQUE_EXTENT_MM if name in _OBLIQUE else EXTENT_MM
    affine, size_xyz = np.eye(4), [0, 0, 0]
    for axis, letter in enumerate(code):
        direction = next(i for i, pair in enumerate(("LR", "PA", "SI")) if letter in pair)
        affine[:3, axis] = 0.0
        affine[direction, axis] = SPACING_LPS_MM[direction] * (1 if letter in "LPS" else -1)
        size_xyz[axis] = int(np.ceil(extent_mm / SPACING_LPS_MM[direction]))
    affine[:3, :3] = turn(angles) @ affine[:3, :3]
    shift = np.random.default_rng(SCANS.index(name)).uniform(-0.5, 0.5, 3)
    affine[:3, 3] = ISOCENTRE_MM - affine[:3, :3] @ ((np.array(size_xyz) - 1) / 2 + shift)
    return (size_xyz[2], size_xyz[1], size_xyz[0]), affine


def scan(shape_zyx: tuple[int, int, int], affine: Affine) -> NDArray[np.int16]:
    """What a scanner measures: the stored value of the ball that holds a voxel's centre."""
    places = places_mm(np.argwhere(np.ones(shape_zyx, bool)), affine)
    values = np.full(len(places), 20, np.int16)
    for centre, radius, stored in zip(CENTRES_MM + ISOCENTRE_MM, RADII_MM, STORED, strict=True):
        values[np.linalg.norm(places - centre, axis=1) < radius] = stored + 100
    values[0] = 0  # no two corners are alike
    return values.reshape(shape_zyx)


def places_mm(zyx: NDArray[np.integer], affine: Affine) -> NDArray[np.float64]:
    """(N, 3) LPS millimetres of (N, 3) voxel indices."""
    return np.asarray((affine @ np.c_[zyx[:, ::-1], np.ones(len(zyx))].T)[:3].T)


def write_scan(folder: Path, name: str) -> list[Path]:
    shape_zyx, affine = scan_grid(name)
    whose: dict[str, str] = {
        "patient_id": f"SCAN-{name}",
        "study_instance_uid": make_uid("orientation study", name),
        "series_instance_uid": make_uid("orientation series", name),
        "frame_of_reference_uid": make_uid("orientation frame", name),
    }
    array = scan(shape_zyx, affine)
    if SCANS.index(name) % 3 == 0:
        return write_classic_series(folder, array, affine, **whose)  # type: ignore[arg-type]
    order = np.random.default_rng(0).permutation(shape_zyx[0]).tolist()
    return write_enhanced_series(folder, array, affine, frame_order=order, **whose)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def returned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    """The SEG of every scan as the node has sent it, by the scan's name."""
    root = tmp_path_factory.mktemp("orientations")
    x_mm, y_mm, z_mm = SPACING_LPS_MM
    bundle = make_threshold_bundle(
        root / "model",
        labels=LABELS,
        thresholds=[stored + 0.5 for stored in STORED],
        orientation="RAS",
        spacing_mm=(z_mm, y_mm, x_mm),
        patch_size=(32, 40, 48),
    )
    registry = Registry(root / "registry", runtimes=("onnxruntime",))
    registry.add(bundle.folder, check_golden=False)
    registry.activate("threshold", "1.0.0")
    paths = [path for name in SCANS for path in write_scan(root / name, name)]
    with (
        StorageScp() as pacs,
        RunningNode(
            root / "node",
            models=registry.root,
            destinations={"pacs": pacs.port},
            profiles={"pacs": {"measurements": False}},  # half of the work, and of no interest here
            routes=[ROUTE],
        ) as node,
    ):
        assert node.send(paths) == paths
        wait_until(lambda: len(pacs.segmentations) == len(SCANS), 300, node.log)
    received = [decoded(each) for each in pacs.segmentations]
    return {str(dataset.PatientID).removeprefix("SCAN-"): dataset for dataset in received}


def decoded(stored: StoredObject) -> Dataset:
    """A received object, with the file meta information that makes it a file."""
    dataset = read_dataset(
        io.BytesIO(stored.data_set), stored.transfer_syntax_uid == ImplicitVRLittleEndian, True
    )
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = stored.sop_class_uid
    dataset.file_meta.MediaStorageSOPInstanceUID = stored.sop_instance_uid
    dataset.file_meta.TransferSyntaxUID = stored.transfer_syntax_uid
    return dataset


def bodies_by_highdicom(seg: Dataset) -> list[NDArray[np.float64]]:
    """The places of every label's voxels and, by the voxel's volume, their weight: (N, 4) for each label."""
    volume = hd.seg.Segmentation.from_dataset(seg).get_volume(combine_segments=True)
    names = {int(item.SegmentNumber): str(item.SegmentLabel) for item in seg.SegmentSequence}
    array = np.asarray(volume.array)
    weight_mm3 = abs(np.linalg.det(volume.affine[:3, :3]))
    found = {}
    for number, name in names.items():
        indices = np.argwhere(array == number)  # highdicom's own index order belongs to its own affine
        places = (volume.affine @ np.c_[indices, np.ones(len(indices))].T)[:3].T
        found[name] = np.c_[places, np.full(len(places), weight_mm3)]
    return [found[name] for name in LABELS]


def bodies_by_dcmqi(seg: Dataset, folder: Path) -> list[NDArray[np.float64]]:
    """The same, converted by dcmqi and read by ITK."""
    seg.save_as(folder / "seg.dcm", enforce_file_format=True)
    out = folder / "out"
    out.mkdir()
    convert = program("segimage2itkimage", "dcmqi of PyPI")
    subprocess.run(
        [
            convert,
            "--inputDICOM",
            folder / "seg.dcm",
            "--outputDirectory",
            out,
            "-t",
            "nrrd",
            "--mergeSegments",
        ],
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.nrrd")
    image = SimpleITK.ReadImage(str(path))
    to_mm = np.eye(4)
    to_mm[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    to_mm[:3, 3] = image.GetOrigin()
    array, weight_mm3 = SimpleITK.GetArrayFromImage(image), abs(np.linalg.det(to_mm[:3, :3]))
    names = {int(item.SegmentNumber): str(item.SegmentLabel) for item in seg.SegmentSequence}
    found = {}
    for number, name in names.items():
        places = places_mm(np.argwhere(array == number), to_mm)
        found[name] = np.c_[places, np.full(len(places), weight_mm3)]
    return [found[name] for name in LABELS]


def handedness(centres_mm: NDArray[np.float64]) -> float:
    """The volume spanned by the ways from the first of four points to the others: a mirror turns its sign."""
    return float(np.linalg.det(centres_mm[1:] - centres_mm[0]))


def assert_is_the_phantom(bodies: list[NDArray[np.float64]]) -> None:
    centres = np.array([body[:, :3].mean(axis=0) for body in bodies]) - ISOCENTRE_MM
    off_voxels = np.abs(centres - CENTRES_MM) / SPACING_LPS_MM.min()
    assert off_voxels.max() < 0.5
    volumes = np.array([body[:, 3].sum() for body in bodies])
    true_volumes = 4 / 3 * np.pi * RADII_MM**3
    assert abs(volumes.sum() / true_volumes.sum() - 1) < 0.01
    assert np.abs(volumes / true_volumes - 1).max() < 0.02  # one ball alone has 1300 voxels or more
    assert handedness(centres) == pytest.approx(handedness(CENTRES_MM), rel=0.05)


def test_no_mirror_image_of_the_phantom_passes_for_it() -> None:
    bodies = [
        np.array([[*centre, 4 / 3 * np.pi * r**3]]) for centre, r in zip(CENTRES_MM, RADII_MM, strict=True)
    ]
    table = np.array([*ISOCENTRE_MM, 0.0])
    in_place = [body + table for body in bodies]
    assert_is_the_phantom(in_place)
    for axis in range(3):
        mirror = np.ones(4)
        mirror[axis] = -1.0
        with pytest.raises(AssertionError):
            assert_is_the_phantom([body * mirror + table for body in bodies])
        assert handedness(CENTRES_MM * mirror[:3]) == pytest.approx(-handedness(CENTRES_MM))


def test_the_scans_are_of_all_48_orientations_and_some_between() -> None:
    assert len({axis_codes(scan_grid(code)[1]) for code in _CODES}) == 48
    assert sum(np.linalg.det(scan_grid(code)[1][:3, :3]) < 0 for code in _CODES) == 24


@pytest.mark.parametrize("name", SCANS)
def test_what_comes_back_is_where_it_is_in_the_patient(returned: dict[str, Dataset], name: str) -> None:
    seg = returned[name]
    assert seg.FrameOfReferenceUID == make_uid("orientation frame", name)
    assert seg.StudyInstanceUID == make_uid("orientation study", name)
    assert_is_the_phantom(bodies_by_highdicom(seg))


@pytest.mark.parametrize("name", ["LPS", "RAI", "SPL", "oblique-PIR", "oblique-ASR"])
def test_dcmqi_finds_it_in_the_same_place(returned: dict[str, Dataset], name: str, tmp_path: Path) -> None:
    assert_is_the_phantom(bodies_by_dcmqi(returned[name], tmp_path))
