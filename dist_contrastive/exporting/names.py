"""What the files of an export are called, and its graphs' inputs and outputs."""

from dist_contrastive.run_folder.names import TOKENIZER

FACTS = "export.json"
MODEL, MODEL_INT8, TEXT_MODEL = "model.onnx", "model.int8.onnx", "text.onnx"
TIMM_WEIGHTS, TIMM_CONFIG = "encoder.safetensors", "encoder.json"
FILES = (MODEL, MODEL_INT8, TEXT_MODEL, TOKENIZER, TIMM_WEIGHTS, TIMM_CONFIG)
"""What there may be beside `FACTS`, which has the SHA-256 sums of those that are there."""

IMAGES, TOKENS = "images", "tokens"
FEATURE, EMBEDDING = "feature", "embedding"
VERSION = 2
"""Of what `FACTS` says."""
