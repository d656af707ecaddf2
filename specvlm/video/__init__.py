"""Video input: readers, frame sampling, preprocessing, and synthetic videos."""
