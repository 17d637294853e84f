"""What a student can be taught beside the labels: one method a file, behind one small interface."""
