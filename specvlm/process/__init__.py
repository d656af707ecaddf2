"""Process-wide state: settings, interrupts, forked children, tensors cached between requests."""
