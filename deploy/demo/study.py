"""A study to show: the average of 152 brains, whole or a crop around a hippocampus, as an MR series."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from models.nifti import read_nifti
from models.volume import Volume, reorient

# ICBM 2009a nonlinear symmetric T1 at 1 mm, skull removed (Fonov et al., NeuroImage 47, 2009), as the wheel
# of nilearn carries it. It is an average of 152 people: nobody's data.
TEMPLATE = "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
CENTRE_LPS_MM = (27.0, 22.0, -14.0)  # the left hippocampus; (-27, -22, -14) in RAS
SIZE_XYZ = (36, 50, 36)

MR_IMAGE_STORAGE = UID("1.2.840.10008.5.1.4.1.1.4")
STUDY_INSTANCE_UID, SERIES_INSTANCE_UID, FRAME_OF_REFERENCE_UID = (
    f"2.25.{0x5E6D0DE000 + n}" for n in range(3)
)


def template_path() -> Path:
    """The T1 inside the installed nilearn, found without importing it."""
    spec = find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise SystemExit("The demo takes its image from nilearn, which is not installed: run make demo.")
    return Path(spec.origin).parent / TEMPLATE


def icbm_brain() -> Volume:
    """The whole template, 197 x 233 x 189 voxels of 1 mm, voxel axes along L, P and S."""
    brain, _ = reorient(read_nifti([template_path()]), "LPS")
    return brain


def hippocampus_crop() -> Volume:
    """36 x 50 x 36 voxels of 1 mm around the hippocampus, voxel axes along L, P and S."""
    head = icbm_brain()
    centre = np.linalg.inv(head.affine) @ (*CENTRE_LPS_MM, 1.0)
    start = np.rint(centre[:3]).astype(int) - np.array(SIZE_XYZ) // 2
    x, y, z = (slice(first, first + size) for first, size in zip(start, SIZE_XYZ, strict=True))
    affine = head.affine.copy()
    affine[:3, 3] = (head.affine @ (*start, 1.0))[:3]
    return Volume(head.array[:, z, y, x], affine)


def write_series(volume: Volume, folder: Path) -> list[Path]:
    """Write a volume whose axes run along L, P and S as an axial MR series, one file a slice."""
    folder.mkdir(parents=True, exist_ok=True)
    spacing_x_mm, spacing_y_mm, spacing_z_mm = np.diag(volume.affine)[:3]
    paths = []
    for number, plane in enumerate(np.rint(volume.array[0]).astype(np.uint16), start=1):
        image = Dataset()
        image.SOPClassUID = MR_IMAGE_STORAGE
        image.SOPInstanceUID = f"{SERIES_INSTANCE_UID}.{number}"
        image.PatientName, image.PatientID = "ICBM152^Average", "SEGNODE-DEMO"
        image.PatientBirthDate, image.PatientSex = "", ""
        image.StudyInstanceUID, image.SeriesInstanceUID = STUDY_INSTANCE_UID, SERIES_INSTANCE_UID
        image.FrameOfReferenceUID, image.PositionReferenceIndicator = FRAME_OF_REFERENCE_UID, ""
        image.StudyDate = image.SeriesDate = image.ContentDate = "20090101"
        image.StudyTime = image.SeriesTime = image.ContentTime = "000000"
        image.AccessionNumber, image.StudyID, image.ReferringPhysicianName = "", "1", ""
        image.Modality, image.Manufacturer = "MR", "segnode demo"
        image.SeriesDescription, image.SeriesNumber, image.InstanceNumber = "T1", 1, number
        image.ImageType = ["DERIVED", "PRIMARY", "OTHER"]
        image.ScanningSequence, image.SequenceVariant, image.ScanOptions = "GR", "NONE", ""
        image.MRAcquisitionType, image.EchoTime, image.EchoTrainLength = "3D", None, None
        image.RepetitionTime = None
        image.ImagePositionPatient = [float(v) for v in (volume.affine @ (0, 0, number - 1, 1))[:3]]
        image.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        image.PixelSpacing = [float(spacing_y_mm), float(spacing_x_mm)]
        image.SliceThickness = float(spacing_z_mm)
        image.Rows, image.Columns = plane.shape
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 0
        image.PixelData = plane.astype("<u2").tobytes()
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        paths.append(folder / f"{number:03d}.dcm")
        image.save_as(paths[-1], enforce_file_format=True)
    return paths
