"""The ground floor: what a model is, and how one is run on a volume.

Nothing here knows about DICOM networking, databases or training, and nothing here imports torch.
"""

from models.telemetry import forbid_telemetry

forbid_telemetry()  # here, because it must come before the first import of a runtime, whoever does that
