"""Scores of an image tower and a text tower: zero-shot classification by prompts, and retrieval both ways."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive import distributed, liveness, signals
from dist_contrastive.data.captions import Captions
from dist_contrastive.data.format import TEST, spoken
from dist_contrastive.data.loader import Loader
from dist_contrastive.evaluation.chunks import chunks
from dist_contrastive.evaluation.features import extract, frozen
from dist_contrastive.methods.image_text import ImageText

PROMPTS = ("{}", "{}.", "a photo of {}.", "a photo of a {}.", "a picture of {}.", "this is {}.", "a patch of {}.")
"""Around a class's name; a class is the mean of their embeddings (Radford et al. 2021, section 3.1.4)."""
RECALLS = (1, 5, 10)
BATCH_SIZE = 256
BLOCK = 2**24
"""Similarities that are held at a time."""


class ImageTextRunner:
    """Scores towers on the test images of one dataset and their captions. All ranks call `score` together and get the same:
    all encode images, rank 0 embeds and compares.

    Captions are told apart by their text: one that several images have is one candidate, and right for each of them.
    """

    def __init__(self, loader: Loader, *, device: torch.device) -> None:
        dataset = loader.dataset
        assert dataset.captions is not None, "the dataset has captions"
        self.loader, self.dataset, self.captions = loader, dataset, dataset.captions
        self.device = device
        self._indices = dataset.indices(TEST)
        own = [dict.fromkeys(self.captions.texts(int(index))) for index in self._indices]
        positions = {text: number for number, text in enumerate(dict.fromkeys(chain.from_iterable(own)))}
        self._texts = list(positions)
        pairs = [(image, positions[text]) for image, texts in enumerate(own) for text in texts]
        self._pairs = torch.tensor(pairs, device=device)

    def score(self, method: ImageText[Any]) -> dict[str, float]:
        """`zero_shot_top1`, where the dataset has classes, and for k in RECALLS the shares of images that find one of their
        captions among the k nearest, `text_recall_at_k`, and of captions that find one of their images, `image_recall_at_k`."""
        features = extract(method.exported, self.loader, self._indices, self.device)

        def measure() -> dict[str, float] | None:
            if not distributed.is_main():
                return None
            embed = partial(embed_texts, method, self.captions, device=self.device)
            with liveness.busy("compares images and texts"), frozen(method):
                images = torch.cat([method.embeddings(piece) for _, piece in chunks(features, self.device)])
                scores = recalls(images, embed(self._texts), self._pairs)
                if self.dataset.manifest.has_labels:
                    names = [spoken(name) for name in self.dataset.manifest.classes]
                    prompts = [[template.format(name) for template in PROMPTS] for name in names]
                    of_classes = torch.stack([embed(of_class).mean(0) for of_class in prompts])
                    labels = torch.from_numpy(self.dataset.labels[self._indices]).to(self.device)
                    scores["zero_shot_top1"] = zero_shot(images, of_classes, labels)
            return scores

        result: dict[str, float] = distributed.broadcast_object(distributed.together(measure))
        return result

    def chances(self) -> dict[str, float]:
        """What guessing scores, under the names that `score` gives."""
        scores = chance_recalls(self._pairs, len(self._indices), len(self._texts))
        if self.dataset.manifest.has_labels:
            scores["zero_shot_top1"] = 1 / len(self.dataset.manifest.classes)
        return scores

    def protocol(self) -> dict[str, Any]:
        """How the scores come about, for whoever compares them."""
        return {
            "prompts": list(PROMPTS) if self.dataset.manifest.has_labels else [],
            "retrieval_images": len(self._indices),
            "retrieval_captions": len(self._texts),
        }


def embed_texts(method: ImageText[Any], captions: Captions, texts: Sequence[str], device: torch.device) -> Tensor:
    """Embeddings float32 [n, E], of unit length, of `texts` as the tokenizer of `captions` reads them; `method` is frozen."""
    parts = []
    for tokens in captions.encode(texts).split(BATCH_SIZE):
        signals.give_way()
        parts.append(method.embed_text(tokens.to(device)))
    return torch.cat(parts)


@torch.no_grad()
def zero_shot(images: Tensor, classes: Tensor, labels: Tensor) -> float:
    """The share of images [n, E] that are nearest to their own class's embedding, of `classes` [C, E]; labels int64 [n]."""
    nearest = (images @ F.normalize(classes, dim=-1).T).argmax(1)
    return float((nearest == labels).float().mean())


@torch.no_grad()
def recalls(images: Tensor, captions: Tensor, pairs: Tensor) -> dict[str, float]:
    """Recall at each k of RECALLS both ways, of `images` [n, E] and `captions` [m, E]; `pairs` int64 [p, 2] says which image and
    which caption belong together.

    Right is whatever has one of its own among the k nearest. What is exactly as near as the nearest of its own, or not a number,
    counts as nearer, so that towers that map everything to one point find nothing.
    """
    found = {"text": _num_nearer(images, captions, pairs), "image": _num_nearer(captions, images, pairs.flip(1))}
    return {
        f"{name}_recall_at_{k}": float((nearer < k).float().mean()) for name, nearer in found.items() for k in RECALLS
    }


def _num_nearer(queries: Tensor, candidates: Tensor, pairs: Tensor) -> Tensor:
    """For each of `queries` [n, E], how many of `candidates` [m, E] that are not its own are as near as the nearest that is:
    int64 [n]."""
    parts = []
    rows = max(1, BLOCK // len(candidates))
    for start in range(0, len(queries), rows):
        similarity = queries[start : start + rows] @ candidates.T
        query, own = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + rows)].T
        query = query - start
        nearest = similarity.new_full((len(similarity),), -math.inf)
        nearest.scatter_reduce_(0, query, similarity[query, own], "amax")
        similarity[query, own] = -math.inf
        parts.append((~(similarity < nearest[:, None])).sum(1))
    return torch.cat(parts)


def chance_recalls(pairs: Tensor, num_images: int, num_captions: int) -> dict[str, float]:
    """`recalls` as they are expected of candidates in an order of chance."""
    scores = {}
    for name, column, num_candidates in (("text", 0, num_captions), ("image", 1, num_images)):
        num_own = pairs[:, column].bincount().double()
        missed = torch.ones_like(num_own)
        for k in range(1, max(RECALLS) + 1):
            # The k-th of the candidates is none of its own, as none was before it.
            left = num_candidates - (k - 1)
            missed *= ((left - num_own) / left).clamp(min=0) if left > 0 else 0.0
            if k in RECALLS:
                scores[f"{name}_recall_at_{k}"] = float(1 - missed.mean())
    return scores
