"""Runs one case with the real libraries. The only part of calibration that imports them, in a process of its own."""
