"""Parse external input, within limits on sizes and values."""
