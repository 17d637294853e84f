"""One wing: from a large nnU-Net teacher to a small student that ships."""
