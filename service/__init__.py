"""One wing: a study in, its segmentation out."""
