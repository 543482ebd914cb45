"""Nearest neighbours by cosine: an index on disk, how it is built and changed, and how it is searched."""
