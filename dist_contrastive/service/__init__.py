"""An export over HTTP: similarity of two images, vectors, nearest neighbours, and a page to try them."""
