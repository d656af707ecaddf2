"""The decoding loop: a request, several in turn, and what is checked and collected on the way."""
