"""Measurements on a real GPU, and what is fitted to them."""
