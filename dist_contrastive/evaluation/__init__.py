"""What a frozen encoder is worth: features, linear and nearest-neighbour probes, spectra, and the protocol around them."""
