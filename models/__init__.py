"""The ground floor: what a model is, and how one is run on a volume.

Nothing here knows about DICOM networking, databases or training, and nothing here imports torch.
"""
