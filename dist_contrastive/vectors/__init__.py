"""Images of a packed dataset or of a folder as vectors of a run: what is embedded, and the files that the vectors go to."""
