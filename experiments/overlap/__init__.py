"""Drafting while the target checks: outcomes recorded on the embedded pairs, and times at true shapes."""
