"""What comes from outside, parsed within bounds."""
