"""Runs written as the files of trainers and launchers, one module per format."""
