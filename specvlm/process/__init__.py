"""Process-wide state: settings, interrupts, forked children, and tensors cached between requests."""
