"""How a step of the decoding loop runs."""
