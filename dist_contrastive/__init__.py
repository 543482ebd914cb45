"""dist_contrastive: a distributed trainer for contrastive and self-distilled representations."""

__version__ = "0.1.0"
