"""A file for each package or family; each has a list ``PEERS``."""
