"""Errors of the training wing; each says what a person should do about it."""

from __future__ import annotations

from models.errors import SegnodeError


class ResultsFolderError(SegnodeError):
    """Raised when an nnU-Net results folder is incomplete, damaged or does not agree with itself."""

    code = "RESULTS_FOLDER_INVALID"


class PlansError(SegnodeError):
    """Raised when a plans file is not one of nnU-Net v2, or asks for something that is not known here."""

    code = "PLANS_UNSUPPORTED"


class StudentError(SegnodeError):
    """Raised when no student can be made as asked, for example of a width that leaves no channel."""

    code = "STUDENT_IMPOSSIBLE"


class LabelsFileError(SegnodeError):
    """Raised when the file that gives labels their codes, colours and limits is missing or wrong."""

    code = "LABELS_FILE_INVALID"


class ExportError(SegnodeError):
    """Raised when a trained model cannot be made into a bundle, or the bundle does not agree with it."""

    code = "EXPORT_FAILED"


class TrainingDataError(SegnodeError):
    """Raised when images, labels or a split for training are missing or do not belong together."""

    code = "TRAINING_DATA_INVALID"


class RecipeError(SegnodeError):
    """Raised when a recipe has a key that does not exist, or a value that is not allowed."""

    code = "RECIPE_INVALID"


class QuantizationGateError(SegnodeError):
    """Raised when INT8 weights cost a label more than is allowed."""

    code = "QUANTIZATION_GATE"
