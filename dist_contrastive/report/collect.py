"""Gathers what a run's report shows: features of test images, their spectra, the images, where a vision transformer looks in
some, the captions that they find, some augmented views."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch

from dist_contrastive import distributed, liveness, rng
from dist_contrastive.config import TrainConfig, to_dict
from dist_contrastive.data.augment import Augment
from dist_contrastive.data.captions import Captions
from dist_contrastive.data.eval_view import EvalView
from dist_contrastive.data.format import TEST, TRAIN
from dist_contrastive.data.loader import Loader
from dist_contrastive.evaluation.features import extract, frozen
from dist_contrastive.evaluation.image_text import embed_texts
from dist_contrastive.losses.statistics import covariance_spectrum
from dist_contrastive.methods.base import Method
from dist_contrastive.methods.image_text import ImageText
from dist_contrastive.metrics import read_metrics
from dist_contrastive.models.attention import last_attention
from dist_contrastive.models.base import Encoder
from dist_contrastive.report.inputs import (
    Attention,
    CaptionSearch,
    FoundCaption,
    ImageSearch,
    Retrieval,
    RunReport,
    failure,
    spread_over_classes,
)
from dist_contrastive.run_folder.names import METRICS

MAX_SAMPLES = 5000  # enough for a spectrum and a map, little enough to hold the thumbnails of ImageNet's test images
THUMBNAIL_SIDE = 64
NUM_EXAMPLES = 8
NUM_SEARCHES, NUM_CAPTION_SEARCHES = 10, 5  # images that look for captions, captions that look for images
NUM_FOUND = 3

T = TypeVar("T")


def collect_report(
    config: TrainConfig,
    loader: Loader,
    *,
    method: Method,
    untrained: Encoder,
    device: torch.device,
    schedules: Mapping[str, Sequence[float]],
    probe: Mapping[str, Any] | None,
    machine: Mapping[str, Any],
    starts: Sequence[Mapping[str, Any]],
    seconds: Callable[[], Mapping[str, float]],
) -> RunReport | None:
    """The report's inputs on rank 0, None elsewhere; all ranks call it, since all of them encode.

    `method` is the trained one, `untrained` its encoder as it was before the first step. What is shown is taken from at most
    MAX_SAMPLES images and their captions, however large the dataset is.
    """
    encoder, dataset = method.exported, loader.dataset
    split, samples = (TEST, "test images") if dataset.manifest.num_test else (TRAIN, "training images")
    indices = dataset.indices(split)
    num_in_split = len(indices)
    indices = np.sort(indices[rng.permutation(config.seed, 0, len(indices))[:MAX_SAMPLES]])
    on_host = [extract(module, loader, indices, device) for module in (encoder, untrained)]

    def collect() -> RunReport | None:
        if not distributed.is_main():
            return None
        with liveness.busy("collects what the report shows"):
            features, untrained_features = (found.to(device) for found in on_host)
            views, originals = example_views(loader)
            has_labels = dataset.manifest.has_labels
            problems: dict[str, str] = {}

            def unless_it_fails(section: str, collect: Callable[[], T | None]) -> T | None:
                try:
                    return collect()
                except Exception as error:  # of any kind: one section is no reason to lose a run that is done
                    problems[section] = failure(error)
                    return None

            def attention() -> Attention | None:
                chosen = spread_over_classes(dataset.labels[indices], NUM_EXAMPLES)
                images = _images(loader, indices[chosen], config.data.image_size)
                return attention_of(encoder, untrained, images, loader.view, device)

            def retrieval() -> Retrieval | None:
                if not isinstance(method, ImageText) or dataset.captions is None:
                    return None
                queries = spread_over_classes(dataset.labels[indices], NUM_SEARCHES)
                return retrieval_of(method, dataset.captions, features, indices, queries)

            return RunReport(
                run_dir=config.run_dir,
                config=to_dict(config),
                metrics=read_metrics(config.run_dir / METRICS),
                schedules=schedules,
                probe=probe,
                learns_from_labels=config.method.needs_labels,
                class_names=dataset.manifest.classes if has_labels else (),
                samples=samples,
                num_in_split=num_in_split,
                features=features.cpu().numpy(),
                labels=dataset.labels[indices] if has_labels else None,
                thumbnails=_images(loader, indices, min(THUMBNAIL_SIDE, config.data.image_size)),
                spectrum=covariance_spectrum(features).cpu().numpy(),
                untrained_spectrum=covariance_spectrum(untrained_features).cpu().numpy(),
                attention=unless_it_fails("attention", attention),
                retrieval=unless_it_fails("retrieval", retrieval),
                problems=problems,
                views=views,
                originals=originals,
                machine=machine,
                starts=starts,
                seconds=seconds,
            )

    return distributed.together(collect)


def attention_of(
    encoder: Encoder, untrained: Encoder, images: np.ndarray, view: EvalView, device: torch.device
) -> Attention | None:
    """Where the class token looks in `images` uint8 [n, S, S, 3], which are normalized as for evaluation; None where there is
    none that attends to patches. What it gives to itself and to registers is left out, so that each head's map sums to 1."""
    normalized = view.normalized(torch.from_numpy(images), device).contiguous(memory_format=torch.channels_last)
    side = 0 if encoder.patch_size is None else encoder.grid(images.shape[1])

    def maps(module: Encoder) -> np.ndarray | None:
        with frozen(module):
            found = last_attention(module, normalized)
        return (
            None if found is None else (found / found.sum(-1, keepdim=True)).unflatten(-1, (side, side)).cpu().numpy()
        )

    trained, before = maps(encoder), maps(untrained)
    return None if trained is None or before is None else Attention(images, trained, before.mean(1))


def retrieval_of(
    method: ImageText[Any], captions: Captions, features: torch.Tensor, indices: np.ndarray, queries: np.ndarray
) -> Retrieval:
    """What the images at the positions `queries` int64 [q] of the samples `indices` int64 [n], with `features` float32 [n, D] of
    `method`'s encoder, find among the captions of all of these, and what some captions of theirs find among the images."""
    own = [captions.texts(int(index)) for index in indices]
    texts = list(dict.fromkeys(chain.from_iterable(own)))
    with frozen(method):
        of_images, of_texts = method.embeddings(features), embed_texts(method, captions, texts, features.device)
    return search(of_images.cpu().numpy(), of_texts.cpu().numpy(), texts, own, queries)


def search(
    images: np.ndarray, captions: np.ndarray, texts: Sequence[str], own: Sequence[Sequence[str]], queries: np.ndarray
) -> Retrieval:
    """`retrieval_of`, of embeddings of unit length: `images` float32 [n, E] with the captions `own` [n], and `captions`
    float32 [m, E] with the different `texts` [m]. q · (n + m) cosines are held, never n · m."""
    position = {text: number for number, text in enumerate(texts)}

    def captions_of(query: int) -> ImageSearch:
        cosines = captions @ images[query]

        def found(number: int) -> FoundCaption:
            return FoundCaption(texts[number], float(cosines[number]), 1 + int((cosines > cosines[number]).sum()))

        mine = sorted((found(position[text]) for text in dict.fromkeys(own[query])), key=lambda caption: caption.place)
        return ImageSearch(query, mine, [found(number) for number in _largest(cosines)])

    def images_of(text: str) -> CaptionSearch:
        cosines = images @ captions[position[text]]
        return CaptionSearch(text, [(image, float(cosines[image]), text in own[image]) for image in _largest(cosines)])

    first = list(dict.fromkeys(own[query][0] for query in queries.tolist()))[:NUM_CAPTION_SEARCHES]
    return Retrieval(
        num_images=len(images),
        num_captions=len(texts),
        images=[captions_of(query) for query in queries.tolist()],
        captions=[images_of(text) for text in first],
    )


def _largest(values: np.ndarray) -> list[int]:
    """Where the NUM_FOUND largest of `values` [n] are, falling; of equal ones the first come first."""
    return np.argsort(-values, kind="stable")[:NUM_FOUND].tolist()


def example_views(loader: Loader) -> tuple[list[np.ndarray], np.ndarray]:
    """Views uint8 [n, V, S, S, 3], for each size, of the first samples of the first epoch as training sees them, and the
    originals uint8 [n, S, S, 3]."""
    train = loader.dataset.indices(TRAIN)
    first = train[rng.permutation(loader.seed, 0, len(train))[:NUM_EXAMPLES]]
    with loader.views(first, batch_size=NUM_EXAMPLES) as batches:
        batch = Augment(loader.augment)(next(batches), torch.device("cpu"))
    views = [loader.view.displayable(of_size).transpose(0, 1).cpu().numpy() for of_size in batch.views]
    return views, _images(loader, first, loader.data.image_size)


def _images(loader: Loader, indices: np.ndarray, side: int) -> np.ndarray:
    """The images `indices` int64 [n] as evaluation sees them, uint8 [n, side, side, 3]."""
    batches = loader.centered(indices, batch_size=256, image_size=side)
    return np.concatenate([batch.views[0][0].cpu().numpy() for batch in batches])
