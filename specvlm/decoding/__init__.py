"""The decoding loop, the scheduler, the losslessness check and the collection of signals."""
