"""Speculative decoding of a model with recurrent layers: a prototype, chains only."""
