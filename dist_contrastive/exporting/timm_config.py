"""What timm needs to know of an encoder, in the form of its own models' config.json."""

from typing import Any

from dist_contrastive.data.eval_view import EvalView
from dist_contrastive.models.base import Encoder
from dist_contrastive.models.encoders import model_options


def timm_config(encoder: Encoder, view: EvalView) -> dict[str, Any]:
    """`timm.create_model(architecture, num_classes=0, **model_args)` takes the weights, but for `changes`, which are to be made
    to it before."""
    config = encoder.config
    changes = {}
    if config.stem == "small":
        changes["stem"] = "conv1 is a 3×3 convolution of stride 1, padding 1, without bias; maxpool is the identity"
    if config.norm == "group":
        changes["norm"] = "each BatchNorm is a GroupNorm"
    return {
        "architecture": config.name,
        "num_classes": 0,
        "num_features": encoder.feature_size,
        "model_args": model_options(config, view.size),
        "changes": changes,
        "pretrained_cfg": {
            "input_size": [3, view.size, view.size],
            "mean": list(view.mean),
            "std": list(view.std),
            "crop_pct": view.crop,
            "crop_mode": "center",
            "interpolation": "bilinear",
            "num_classes": 0,
        },
    }
