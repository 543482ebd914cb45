"""The nearest-neighbour probe: no parameters, so nothing to tune and nothing to overfit."""

import math
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive.evaluation.chunks import chunks, settle
from dist_contrastive.evaluation.precision import full_precision

CHUNK_VALUES = 1 << 24
"""Similarities held at a time (64 MiB of float32, or a few times as much where many are equal)."""
LARGEST_K = 200
NEIGHBOURS_OF_CLASS = 6
"""A vote asks at most one of as many images of a class."""
AUTOMATIC_K = f"automatic: 1/{NEIGHBOURS_OF_CLASS} of the training samples of the median class, at most {LARGEST_K}"
BY_K = (1, 5, 10, 20, 50, 100, LARGEST_K)
"""The k that are reported beside the one that counts."""
EQUAL_VOTES = 1e-9
"""Votes that differ by less than this part of the largest differ by rounding alone: a GPU adds them in any order."""


def automatic_k(train_y: Tensor) -> int:
    """The k of a training set with labels `train_y` int64 [N]: 200, or a sixth of the median class where that is less.

    200 is what Wu et al. (2018, section 4.1) took for ImageNet's 1,300 images a class, a sixth of them, and has been usual
    since. Where classes are smaller, 200 neighbours would be mostly of other classes: the same share is asked instead. The k
    depends on the labels of the training set alone, so that no score has a say in it.
    """
    sizes = torch.bincount(train_y)
    return max(1, min(LARGEST_K, int(sizes[sizes > 0].median()) // NEIGHBOURS_OF_CLASS))


def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    num_classes: int,
    ks: Collection[int],
    temperature: float,
    device: torch.device | None = None,
) -> dict[int, Tensor]:
    """For each k the class int64 [M] of each of `test_x` [M, D] by weighted vote of its k nearest among `train_x` [N, D].

    Nearness is the cosine s, a vote weighs exp(s / temperature) (Wu et al. 2018, "Unsupervised feature learning via
    non-parametric instance discrimination", section 3.4). Of equally near samples the first in the training set are the
    neighbours, of classes with equal votes the lowest wins. With fewer than k training samples all of them vote.

    Features are floats or bytes. Computed on `device`, by default that of `train_x`, with pieces of both sets and the nearest so
    far in its memory; features that don't fit there stay where they are.
    """
    device = device or train_x.device
    with full_precision(device):
        train_x, train_y = settle(train_x, device), train_y.to(device)
        num_nearest = min(max(ks), len(train_x))
        predictions: dict[int, list[Tensor]] = {k: [] for k in sorted(ks)}
        bank_rows = min(len(train_x), math.isqrt(CHUNK_VALUES))
        rows = max(1, CHUNK_VALUES // max(num_classes, num_nearest + bank_rows, test_x.shape[1]))
        for _, queries in chunks(test_x, device, rows):
            similarity, nearest = _nearest_of_all(_unit_rows(queries), train_x, num_nearest, bank_rows)
            # exp((s - s_nearest) / t) in float64: a factor of the row's own changes no vote, and the nearest counts 1 at
            # any temperature, where a factor for all rows would let all votes of some underflow.
            similarity = similarity.double()
            weights = ((similarity - similarity[:, :1]) / temperature).exp()
            votes = weights.new_zeros(len(queries), num_classes)
            counted = 0
            for k, found in predictions.items():
                votes.scatter_add_(1, train_y[nearest[:, counted:k]], weights[:, counted:k])
                counted = k
                most = votes.amax(1, keepdim=True)
                found.append((votes >= most * (1 - EQUAL_VOTES)).int().argmax(1))
        return {k: torch.cat(found) for k, found in predictions.items()}


def _nearest_of_all(queries: Tensor, bank: Tensor, k: int, rows: int) -> tuple[Tensor, Tensor]:
    """The k largest cosines [M, k] of unit `queries` [M, D] with the samples of `bank` [N, D], falling, and whose they are, int64
    [M, k]; of equal ones the first come first. The bank is read `rows` at a time."""
    best = queries.new_empty(len(queries), 0)
    places = best.long()
    for piece, samples in chunks(bank, queries.device, rows):
        # What is best so far comes first, in the order of the bank where it is equal: so does it of all.
        similarity = torch.cat([best, queries @ _unit_rows(samples).T], dim=1)
        found = _nearest(similarity, min(k, similarity.shape[1]))
        here = torch.arange(piece.start, piece.stop, device=places.device).expand(len(places), -1)
        best, places = similarity.gather(1, found), torch.cat([places, here], dim=1).gather(1, found)
    return best, places


def _unit_rows(x: Tensor) -> Tensor:
    """Rows of `x` [N, D] scaled to length 1, float32, however short or long they are; rows of zeros stay."""
    x = x.float()
    largest = x.abs().amax(1, keepdim=True)
    return F.normalize(x / largest.where(largest > 0, 1.0), dim=1)


def _nearest(similarity: Tensor, k: int) -> Tensor:
    """Where the k largest of each row of `similarity` [M, N] are, int64 [M, k], falling; of equal ones the first come first.

    `topk` alone takes any of those that are equal.
    """
    values, found = similarity.topk(k, dim=1)
    last = values[:, -1:]
    tied = (similarity >= last).sum(1) > k
    rows, last = similarity[tied], last[tied]
    above, equal = rows > last, rows == last
    room = k - above.sum(1, keepdim=True)
    found[tied] = (above | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].view(-1, k)
    found = found.sort(1).values
    return found.gather(1, similarity.gather(1, found).sort(dim=1, descending=True, stable=True).indices)
