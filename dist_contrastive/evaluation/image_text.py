"""Scores of an image tower and a text tower: zero-shot classification by prompts, and retrieval both ways."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive import distributed, signals
from dist_contrastive.config import AugmentConfig, DataConfig
from dist_contrastive.data.beton import Dataset
from dist_contrastive.data.captions import Captions
from dist_contrastive.data.format import TEST
from dist_contrastive.evaluation.features import extract, frozen
from dist_contrastive.methods.image_text import ImageText

PROMPTS = ("{}", "{}.", "a photo of {}.", "a photo of a {}.", "a picture of {}.", "this is {}.", "a patch of {}.")
"""Around a class's name; a class is the mean of their embeddings (Radford et al. 2021, section 3.1.4)."""
RECALLS = (1, 5, 10)
BATCH_SIZE = 256
BLOCK = 1024
"""Rows whose similarities to all others are held at a time."""


class ImageTextRunner:
    """Scores towers on the test images of one dataset and their captions. All ranks call `score` together."""

    def __init__(
        self, dataset: Dataset, *, data: DataConfig, augment: AugmentConfig, device: torch.device, threads: int
    ) -> None:
        assert dataset.captions is not None, "the dataset has captions"
        self.dataset, self.captions = dataset, dataset.captions
        self.device = device
        self._settings: dict[str, Any] = {"data": data, "augment": augment, "device": device, "threads": threads}
        self._indices = dataset.indices(TEST)

    def score(self, method: ImageText[Any]) -> dict[str, float]:
        """`zero_shot_top1`, where the dataset has classes, and for k in RECALLS the shares of images that find one of their
        captions among the k nearest, `text_recall_at_k`, and of captions that find their image, `image_recall_at_k`."""
        features = extract(method.exported, self.dataset, self._indices, **self._settings)
        texts = [self.captions.texts(int(index)) for index in self._indices]
        owners = torch.tensor([image for image, own in enumerate(texts) for _ in own], device=self.device)

        def measure() -> dict[str, float]:
            with frozen(method):
                images = embed_images(method, features)
                captions = self._embed(method, [text for own in texts for text in own])
                scores = recalls(images, captions, owners)
                names = self.dataset.manifest.classes
                if self.dataset.manifest.has_labels:
                    prompts = [[template.format(name) for template in PROMPTS] for name in names]
                    of_classes = torch.stack([self._embed(method, of_class).mean(0) for of_class in prompts])
                    labels = torch.from_numpy(self.dataset.labels[self._indices]).to(self.device)
                    scores["zero_shot_top1"] = zero_shot(images, of_classes, labels)
            return scores

        return distributed.together(measure)

    def _embed(self, method: ImageText[Any], texts: Sequence[str]) -> Tensor:
        """Embeddings [n, E] of texts."""
        return embed_texts(method, self.captions, texts, self.device)


def embed_images(method: ImageText[Any], features: Tensor) -> Tensor:
    """Embeddings float32 [n, E], of unit length, of images with `features` [n, D] of `method`'s encoder; it is frozen."""
    return F.normalize(method.projector(features).float(), dim=-1)


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
def recalls(images: Tensor, captions: Tensor, owners: Tensor) -> dict[str, float]:
    """Recall at each k of RECALLS both ways, of `images` [n, E] and `captions` [m, E] of the images `owners` int64 [m].

    An image is found among all images, a caption among all captions; an image with several captions is right with any of them.
    """
    most = min(max(RECALLS), len(captions))
    texts_found, images_found = [], []
    for start in range(0, len(images), BLOCK):
        rows = torch.arange(start, min(start + BLOCK, len(images)), device=images.device)
        nearest = (images[rows] @ captions.T).topk(most, dim=1).indices
        texts_found.append(owners[nearest] == rows[:, None])
    for start in range(0, len(captions), BLOCK):
        part = captions[start : start + BLOCK]
        nearest = (part @ images.T).topk(min(max(RECALLS), len(images)), dim=1).indices
        images_found.append(nearest == owners[start : start + BLOCK, None])
    of_images, of_texts = torch.cat(texts_found), torch.cat(images_found)
    return {
        f"{name}_recall_at_{k}": float(found[:, :k].any(1).float().mean())
        for name, found in (("text", of_images), ("image", of_texts))
        for k in RECALLS
    }
