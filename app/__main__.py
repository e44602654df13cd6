"""`python -m app`: the same as the console script `vramplan`."""

from app.cli import main

main()
