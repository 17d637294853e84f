"""The commands of ``segnode``, one noun a file. Heavy libraries are imported inside the commands."""
