"""What a frozen encoder is worth: its features, linear and nearest-neighbour probes, and the protocol around them."""
