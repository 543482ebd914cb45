"""A run as files that need no torch: ONNX graphs that take uint8 images of any size, an int8 form as good, timm's weights."""
