"""DICOM at the borders of the node: receiving, reading series, writing segmentations, sending."""
