"""Decoding loop, scheduler, losslessness check and collection of signals."""
