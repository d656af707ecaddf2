"""Parse external input within bounds."""
