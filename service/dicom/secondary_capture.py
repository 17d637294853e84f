"""A colour picture of the result as a secondary capture, for viewers that show no segmentation.

What it shows is burned in and cannot be measured on: the picture says itself that it is unverified, and has
R, L, A, P, S and I at its edges. It names no patient: that is in the header alone.
"""

from __future__ import annotations

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian

from models.manifest import Manifest
from service.dicom.coding import code_sequence
from service.dicom.derived import (
    Making,
    references_of,
    set_dates,
    set_device,
    set_equipment,
    set_identity,
    set_implementation,
    set_lossy,
    unverified,
)
from service.dicom.elements import quiet
from service.dicom.series import SourceSeries

SERIES_NUMBER = 902

_SOURCE_IMAGE = Code("121322", "DCM", "Source image for image processing operation")


def build_secondary_capture(
    source: SourceSeries, picture: NDArray[np.uint8], manifest: Manifest, making: Making
) -> Dataset:
    """Encode a picture as a Secondary Capture Image of the source's study (PS3.3 A.8.1).

    Parameters
    ----------
    source : SourceSeries
        The series that was segmented.
    picture : (rows, columns, 3) array, uint8
        Red, green and blue.
    manifest : Manifest
        The model, for the description.
    making : Making
        UIDs, time and model digest.

    Returns
    -------
    Dataset
        With ``file_meta``, in explicit VR little endian.
    """
    source.identity.require_whole()
    with quiet():  # identifiers that break their VR are passed on as they are
        made = hd.sc.SCImage(
            pixel_array=picture,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("L", "P"),
            study_instance_uid=source.study_instance_uid,
            series_instance_uid=making.series_instance_uid,
            series_number=SERIES_NUMBER,
            sop_instance_uid=making.sop_instance_uid,
            instance_number=1,
            manufacturer="segnode",
            series_description=unverified(manifest.title),
        )
        dataset = Dataset()
        dataset.update(made)
        dataset.file_meta = made.file_meta
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        set_identity(dataset, source.identity, source.headers)
        set_device(dataset, making)
        set_dates(dataset, making.content_datetime)
        set_implementation(dataset, making)
        set_equipment(dataset, making, manifest)
        set_lossy(dataset, source)
        dataset.DateOfSecondaryCapture, dataset.TimeOfSecondaryCapture = (
            dataset.ContentDate,
            dataset.ContentTime,
        )
        dataset.ConversionType = "WSD"  # made by a workstation
        dataset.PatientOrientation = None  # three planes: no direction holds for the whole picture
        dataset.BurnedInAnnotation = "NO"  # PS3.3 C.7.6.1.1: nothing that identifies a patient
        dataset.DerivationDescription = "Three planes with the labels that a model found; not for diagnosis"
        images = [reference.item() for reference in references_of(source)]
        for image in images:
            image.PurposeOfReferenceCodeSequence = code_sequence(_SOURCE_IMAGE)
        dataset.SourceImageSequence = DicomSequence(images)
    return dataset
