"""Tests of the benchmark programs: what they refuse, what they write. No test asks how fast."""
