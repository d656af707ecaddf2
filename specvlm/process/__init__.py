"""What belongs to the process: settings, interrupts, forked children, tables kept between requests."""
