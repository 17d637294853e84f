"""``make demo``: a node, a study over DICOM, its SEG back, volumes and a picture."""
