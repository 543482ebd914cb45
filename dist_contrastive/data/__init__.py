"""Sources, packing, loading and augmentation of images."""
