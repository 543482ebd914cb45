"""One update: the gradient of a global batch, what averages it over ranks, and the memory that it takes."""
