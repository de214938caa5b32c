"""Generated masks: what they store, the numbers that describe them, their pictures."""
