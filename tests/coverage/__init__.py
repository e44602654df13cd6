"""Which architectures and recipes can be traced: the table that `make coverage` prints."""
