"""Video in: readers, sampling and preprocessing, and the synthetic world."""
