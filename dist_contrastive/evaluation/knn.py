"""The nearest-neighbour probe: no parameters, so nothing to tune and nothing to overfit."""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_VALUES = 1 << 26
"""Similarities held at a time (256 MiB of float32)."""


@torch.no_grad()
def knn_predict(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, *, num_classes: int, k: int, temperature: float
) -> Tensor:
    """The class int64 [M] of each of `test_x` [M, D] by weighted vote of its k nearest among `train_x` [N, D].

    Nearness is the cosine s, a vote weighs exp(s / temperature) (Wu et al. 2018, "Unsupervised feature learning via
    non-parametric instance discrimination", section 3.4). With fewer than k training samples all of them vote.
    """
    with torch.autocast(train_x.device.type, enabled=False):
        bank = F.normalize(train_x.float(), dim=1)
        chunk = max(1, CHUNK_VALUES // max(1, len(bank)))
        predictions = []
        for queries in F.normalize(test_x.float(), dim=1).split(chunk):
            similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
            # exp((s - 1) / t): the constant factor keeps small temperatures finite and changes no vote.
            weights = ((similarity - 1) / temperature).exp()
            votes = weights.new_zeros(len(queries), num_classes).scatter_add_(1, train_y[nearest], weights)
            predictions.append(votes.argmax(1))
        return torch.cat(predictions)
