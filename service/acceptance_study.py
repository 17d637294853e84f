"""A study to accept a node with: the golden image of a model as a DICOM series of nobody."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from models.bundle import Bundle
from models.errors import SegnodeError
from models.nifti import read_nifti
from models.volume import Volume

_CLASSES: dict[str, UID] = {"MR": MRImageStorage, "CT": CTImageStorage}
_LARGEST = 2**15 - 1


class NoPhantomError(SegnodeError):
    """Raised when no study can be made of a model's golden case."""

    code = "NO_PHANTOM"


def write_phantom(bundle: Bundle, folder: Path, attributes: Mapping[str, str]) -> list[Path]:
    """Write the golden image of a model as a series of a new study; one file a slice, in their order.

    Parameters
    ----------
    bundle : Bundle
        Has one channel, of MR or CT; MR is meant where it names none.
    folder : Path
        Made if it is not there.
    attributes : mapping
        Values by DICOM keyword, set on every image: what a route asks for, or the site's own test patient.

    Raises
    ------
    NoPhantomError
        If the model has several channels, or one of another modality.
    """
    channels = bundle.manifest.channels
    modality = channels[0].modality or attributes.get("Modality", "MR")  # a model may name none
    if len(channels) != 1 or modality not in _CLASSES:
        wanted = ", ".join(f"{channel.name} ({channel.modality})" for channel in channels)
        raise NoPhantomError(
            f"No phantom can be made for the channels of {bundle.manifest.name}: {wanted}.",
            remedy="Give a test study of your own with --study.",
        )
    volume = read_nifti([bundle.folder / "golden" / "image_0000.nii.gz"])
    stored = _stored_values(volume, modality)
    study, series, frame_of_reference = (generate_uid(prefix=None) for _ in range(3))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, plane in enumerate(stored):
        image = Dataset()
        image.SOPClassUID, image.SOPInstanceUID = _CLASSES[modality], generate_uid(prefix=None)
        image.StudyInstanceUID, image.SeriesInstanceUID = study, series
        image.FrameOfReferenceUID, image.PositionReferenceIndicator = frame_of_reference, ""
        image.PatientName, image.PatientID = "ACCEPTANCE^SEGNODE", "SEGNODE-ACCEPTANCE"
        image.PatientBirthDate, image.PatientSex = "", ""
        image.StudyDate = image.StudyTime = image.AccessionNumber = image.ReferringPhysicianName = ""
        image.StudyID, image.StudyDescription = "1", "segnode acceptance"
        image.Modality, image.Manufacturer = modality, "segnode"
        image.SeriesDescription, image.SeriesNumber, image.InstanceNumber = "Acceptance phantom", 1, k + 1
        image.ImageType = ["DERIVED", "PRIMARY", "OTHER" if modality == "MR" else "AXIAL"]
        _add_geometry(image, volume.affine, k)
        _add_pixels(image, plane)
        if modality == "MR":
            image.ScanningSequence, image.SequenceVariant, image.ScanOptions = "GR", "NONE", ""
            image.MRAcquisitionType, image.EchoTime, image.EchoTrainLength = "3D", None, None
            image.RepetitionTime = None
        else:
            image.RescaleIntercept, image.RescaleSlope, image.RescaleType = 0, 1, "HU"
            image.KVP, image.AcquisitionNumber = None, None
        for keyword, value in attributes.items():
            setattr(image, keyword, value)
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        paths.append(folder / f"{k + 1:04d}.dcm")
        image.save_as(paths[-1], enforce_file_format=True)
    return paths


def _stored_values(volume: Volume, modality: str) -> NDArray[np.int16]:
    """(Z, Y, X) of int16. CT in HU; MR, whose unit is arbitrary, spread over the range where it must be."""
    values = volume.array[0].astype(np.float64)
    fits = values.min() >= -_LARGEST and values.max() <= _LARGEST
    if modality != "CT" and not (fits and np.array_equal(values, np.rint(values))):
        values = (values - values.min()) * (_LARGEST / max(float(np.ptp(values)), 1e-9))
    stored: NDArray[np.int16] = np.clip(np.rint(values), -_LARGEST, _LARGEST).astype(np.int16)
    return stored


def _add_geometry(image: Dataset, affine: NDArray[np.float64], k: int) -> None:
    steps_mm = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / steps_mm
    position_mm = affine[:3, 3] + k * affine[:3, 2]
    image.ImagePositionPatient = [f"{value:.10g}" for value in position_mm]
    image.ImageOrientationPatient = [f"{value:.8f}" for value in (*directions[:, 0], *directions[:, 1])]
    image.PixelSpacing = [f"{steps_mm[1]:.10g}", f"{steps_mm[0]:.10g}"]  # between rows, between columns
    image.SliceThickness = f"{steps_mm[2]:.10g}"


def _add_pixels(image: Dataset, plane: NDArray[np.int16]) -> None:
    image.Rows, image.Columns = plane.shape
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
    image.PixelData = plane.astype("<i2").tobytes()
