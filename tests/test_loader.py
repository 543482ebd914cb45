"""The loader's contracts: order, crops, pixels, ownership, errors, threads."""

import gc
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from dist_contrastive import rng
from dist_contrastive.batch import Batch, Samples, Share
from dist_contrastive.config import AugmentConfig, DataConfig, UserError, ViewConfig
from dist_contrastive.data import loader
from dist_contrastive.data.augment.draws import Drawer
from dist_contrastive.data.beton import Dataset, open_dataset
from dist_contrastive.data.crops import random_boxes
from dist_contrastive.data.format import TEST, TRAIN
from dist_contrastive.data.loader import Batches, Crops, Loader, fair_threads
from dist_contrastive.rendezvous import fair_cores
from tests.betons import decoded, jpeg, open_loader, picture, write_beton

SHAPES = [(32, 32), (48, 31), (64, 200), (5, 90), (1, 1), (7, 1), (150, 120), (33, 47), (1, 9), (16, 16)]
NUM_SAMPLES, NUM_TEST = 53, 7
GLOBAL_BATCH = 12
SIZE = 24
DATA = DataConfig(image_size=SIZE, timeout_s=60)
AUGMENT = AugmentConfig()
# Levels of 255. FFCV asks libjpeg-turbo for its fast transform, Pillow for the accurate one: about one level apart on
# average and a few at most at the qualities that are tested (75 to 90).
JPEG_TOLERANCE = 6


def sources() -> list[np.ndarray | bytes]:
    """Pictures of all shapes, every third stored as a JPEG."""
    pictures = [picture(*SHAPES[i % len(SHAPES)], seed=i) for i in range(NUM_SAMPLES)]
    return [jpeg(image) if i % 3 == 0 else image for i, image in enumerate(pictures)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_beton(tmp_path_factory.mktemp("mixed") / "mixed.beton", sources(), num_test=NUM_TEST))


@pytest.fixture(scope="module")
def pixels() -> list[np.ndarray]:
    """What Pillow makes of each sample, uint8 [H, W, 3]."""
    return [decoded(image) if isinstance(image, bytes) else image for image in sources()]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """200 raw samples of 16 × 16."""
    images = [picture(16, 16, seed=i) for i in range(200)]
    return open_dataset(write_beton(tmp_path_factory.mktemp("small") / "small.beton", images))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Holds for every test here: once it is over, so are the loader's threads that it started."""
    before = loader_threads()
    yield
    gc.collect()  # an error's traceback is in a circle with the pass that raised it
    assert [thread for thread in loader_threads() if thread not in before] == []


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader-")]


def loader_of(dataset: Dataset, data: DataConfig = DATA, augment: AugmentConfig = AUGMENT, **options: Any) -> Loader:
    defaults: dict[str, Any] = {"share": Share(GLOBAL_BATCH), "threads": 2}
    return open_loader(dataset, data, augment, **(defaults | options))


def epoch_of(dataset: Dataset, *args: Any, epoch: int = 0, start_step: int = 0, **options: Any) -> Batches:
    return loader_of(dataset, *args, **options).epoch(epoch, start_step)


def centered(dataset: Dataset, indices: Any, batch_size: int, data: DataConfig = DATA, **options: Any) -> Batches:
    return loader_of(dataset, data, **options).centered(indices, batch_size=batch_size)


def global_batches(dataset: Dataset, num_ranks: int = 1, **options: Any) -> list[Batch]:
    """The ranks' batches of each step side by side."""
    shares = [Share(GLOBAL_BATCH, rank, num_ranks) for rank in range(num_ranks)]
    of_ranks = [list(epoch_of(dataset, share=share, **options)) for share in shares]
    return [
        batch_of(
            torch.cat([batch.views[0] for batch in batches], dim=1),
            torch.cat([batch.samples.labels for batch in batches]),
            torch.cat([batch.samples.indices for batch in batches]),
            batches[0].samples.epoch,
            torch.cat([drawn(batch) for batch in batches], dim=1),
        )
        for batches in zip(*of_ranks, strict=True)
    ]


def batch_of(
    views: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor, epoch: int, draws: torch.Tensor | None
) -> Batch:
    return Batch((views,), Samples(labels, indices, epoch), draws=draws)


def drawn(batch: Batch) -> torch.Tensor:
    assert batch.draws is not None
    return batch.draws


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.samples.indices, theirs.samples.indices)
        assert torch.equal(ours.samples.labels, theirs.samples.labels)
        assert torch.equal(ours.views[0], theirs.views[0])
        assert (ours.draws is None) == (theirs.draws is None)
        assert ours.draws is None or torch.equal(ours.draws, drawn(theirs))


def resized_by_torchvision(image: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """The crop `box` of `image` uint8 [H, W, 3], resized in float: [S, S, 3]."""
    top, left, height, width = (int(number) for number in box)
    planes = torch.from_numpy(image).permute(2, 0, 1).float()
    bilinear = InterpolationMode.BILINEAR
    resized = F.resized_crop(planes, top, left, height, width, [size, size], interpolation=bilinear, antialias=True)
    return resized.permute(1, 2, 0).numpy()


# Order


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_an_epoch_is_the_global_permutation_sliced_by_step_and_rank(dataset, num_ranks):
    train = dataset.indices(TRAIN)
    order = train[rng.permutation(3, 5, len(train))]
    per_rank = GLOBAL_BATCH // num_ranks
    for rank in range(num_ranks):
        batches = list(epoch_of(dataset, seed=3, epoch=5, share=Share(GLOBAL_BATCH, rank, num_ranks)))
        assert len(batches) == len(train) // GLOBAL_BATCH
        for step, batch in enumerate(batches):
            start = step * GLOBAL_BATCH + rank * per_rank
            np.testing.assert_array_equal(batch.samples.indices, order[start : start + per_rank])
            np.testing.assert_array_equal(batch.samples.labels, dataset.labels[batch.samples.indices])
            assert batch.views[0].shape == (2, per_rank, SIZE, SIZE, 3)
            assert batch.views[0].dtype == torch.uint8
            assert batch.samples.labels.dtype == batch.samples.indices.dtype == torch.int64
            assert batch.samples.epoch == 5
            assert torch.equal(drawn(batch), Drawer(AUGMENT, 3).draw(batch.samples))


def test_only_the_incomplete_last_batch_is_dropped_and_no_sample_comes_twice(dataset):
    seen = torch.cat([batch.samples.indices for batch in global_batches(dataset, num_ranks=2)]).tolist()
    num_train = NUM_SAMPLES - NUM_TEST
    assert len(seen) == len(set(seen)) == num_train // GLOBAL_BATCH * GLOBAL_BATCH
    assert set(seen) <= set(dataset.indices(TRAIN).tolist())
    # Where the batch divides the epoch, all of it comes.
    exact = torch.cat([batch.samples.indices for batch in epoch_of(dataset, share=Share(2))])
    np.testing.assert_array_equal(exact.sort().values, dataset.indices(TRAIN))


def test_threads_and_ranks_change_no_pixel(dataset):
    expected = global_batches(dataset, threads=1)
    for num_ranks, threads in [(1, 2), (1, 4), (2, 1), (4, 2)]:
        assert_same(global_batches(dataset, num_ranks, threads=threads), expected)


@pytest.mark.parametrize(("start_step", "num_ranks"), [(1, 1), (2, 2), (3, 4)])
def test_a_start_in_mid_epoch_gives_what_the_whole_epoch_gives_there(dataset, start_step, num_ranks):
    whole = global_batches(dataset)
    rest = global_batches(dataset, num_ranks, start_step=start_step)
    assert len(rest) == len(whole) - start_step
    assert_same(rest, whole[start_step:])


def test_a_start_at_the_epochs_end_gives_nothing(dataset):
    assert list(epoch_of(dataset, start_step=(NUM_SAMPLES - NUM_TEST) // GLOBAL_BATCH)) == []


def test_the_length_is_what_is_still_to_come(dataset):
    with epoch_of(dataset) as epoch:
        lengths = [len(epoch)] + [len(epoch) for _ in epoch]
    assert lengths == [3, 2, 1, 0]
    assert epoch.wait_ms >= 0


# Crops


def test_crops_and_order_differ_by_seed_and_epoch(dataset):
    first = global_batches(dataset)
    assert_same(global_batches(dataset), first)
    for options in ({"seed": 1}, {"epoch": 1}):
        for batch, other in zip(first, global_batches(dataset, **options), strict=True):
            assert not torch.equal(batch.samples.indices, other.samples.indices)


def test_a_samples_boxes_differ_by_seed_epoch_and_view_and_depend_on_nothing_else(small):
    samples = np.arange(200)
    boxes = random_boxes(small, AUGMENT, seed=0, epoch=0, samples=samples)

    def share_equal(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.mean(np.all(one == other, axis=-1)))

    assert boxes.shape == (2, 200, 4)
    assert share_equal(boxes[0], boxes[1]) < 0.05
    assert share_equal(boxes, random_boxes(small, AUGMENT, seed=1, epoch=0, samples=samples)) < 0.05
    assert share_equal(boxes, random_boxes(small, AUGMENT, seed=0, epoch=1, samples=samples)) < 0.05
    some = np.array([150, 3, 77])
    np.testing.assert_array_equal(random_boxes(small, AUGMENT, seed=0, epoch=0, samples=some), boxes[:, some])
    more_views = random_boxes(small, AugmentConfig((ViewConfig(count=5),)), seed=0, epoch=0, samples=samples)
    np.testing.assert_array_equal(more_views[:2], boxes)


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.6)])
@pytest.mark.parametrize("shape", [(32, 32), (64, 200), (150, 120)])
def test_boxes_are_distributed_as_torchvisions(dataset, shape, scale):
    """Two-sample Kolmogorov-Smirnov tests of area, aspect ratio and place against 2,000 of torchvision's boxes."""
    height, width = shape
    augment = AugmentConfig((ViewConfig(count=2000, crop_scale=scale),))
    sample = np.array([SHAPES.index(shape)])
    ours = random_boxes(dataset, augment, seed=0, epoch=0, samples=sample)[:, 0]
    assert np.all(ours[:, :2] >= 0)
    assert np.all(ours[:, 2:] >= 1)
    assert np.all(ours[:, 0] + ours[:, 2] <= height)
    assert np.all(ours[:, 1] + ours[:, 3] <= width)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ViewConfig().crop_ratio)) for _ in ours])
    for name, value in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "top of its room": lambda b: b[:, 0] / np.maximum(1, height - b[:, 2]),
    }.items():
        assert stats.ks_2samp(value(ours), value(theirs)).pvalue > 1e-4, name
    # A try is refused only where the box would not fit, so area and ratio keep to their limits but for rounding.
    if shape == (32, 32):
        area = ours[:, 2] * ours[:, 3] / (height * width)
        assert scale[0] - 0.05 < area.min() < area.max() < scale[1] + 0.05
        assert 0.6 < (ours[:, 3] / ours[:, 2]).min() < (ours[:, 3] / ours[:, 2]).max() < 1.6


@pytest.mark.parametrize("shape", [(5, 90), (7, 1), (1, 9), (1, 1)])
def test_where_no_try_fits_the_box_is_torchvisions_centred_one(dataset, shape):
    augment = AugmentConfig((ViewConfig(count=20, crop_scale=(1.0, 1.0)),))
    boxes = random_boxes(dataset, augment, seed=0, epoch=0, samples=np.array([SHAPES.index(shape)]))
    expected = RandomResizedCrop.get_params(torch.empty(3, *shape), [1.0, 1.0], list(ViewConfig().crop_ratio))
    if shape[1] == 1:  # torchvision's crop of a column has no pixel left once its width is rounded
        expected = tuple(max(number, floor) for number, floor in zip(expected, (0, 0, 1, 1), strict=True))
    np.testing.assert_array_equal(boxes[:, 0], np.broadcast_to(expected, (20, 4)))


# Pixels


@pytest.mark.parametrize("size", [1, 7, 24, 64])
def test_views_are_torchvisions_antialiased_bilinear_crops(dataset, pixels, size):
    """Raw images to the rounding; JPEGs within the decoder's tolerance of Pillow's pixels."""
    worst = {0: 0.0, 1: 0.0}
    for batch in epoch_of(dataset, DataConfig(image_size=size), seed=size):
        samples = batch.samples.indices.numpy()
        boxes = random_boxes(dataset, AUGMENT, seed=size, epoch=0, samples=samples)
        for view, position in itertools.product(range(2), range(len(samples))):
            sample = samples[position]
            expected = resized_by_torchvision(pixels[sample], boxes[view, position], size)
            error = np.abs(batch.views[0][view, position].numpy() - expected).max()
            kind = int(dataset.is_jpeg[sample])
            worst[kind] = max(worst[kind], error)
    assert worst[0] < 0.51
    assert worst[1] < JPEG_TOLERANCE


def test_raw_images_are_copied_exactly_where_nothing_is_resized(dataset, pixels):
    raw = [i for i in range(NUM_SAMPLES) if pixels[i].shape == (16, 16, 3) and dataset.is_jpeg[i] == 0]
    (batch,) = centered(dataset, np.array(raw), 50, DataConfig(image_size=16))
    np.testing.assert_array_equal(batch.views[0][0], np.stack([pixels[i] for i in raw]))


def test_jpegs_are_decoded_as_pillow_does(tmp_path):
    encoded = [jpeg(picture(40, 40, seed), quality) for seed in range(6) for quality in (75, 90)]
    encoded.append(jpeg(np.full((40, 40, 3), 200, np.uint8)))
    encoded.append(jpeg(picture(40, 40, 9)[:, :, 0]))  # one channel becomes three
    dataset = open_dataset(write_beton(tmp_path / "jpeg.beton", encoded))
    (batch,) = centered(dataset, np.arange(len(encoded)), 50, DataConfig(image_size=40))
    for view, data in zip(batch.views[0][0].numpy(), encoded, strict=True):
        expected = decoded(data)
        difference = np.abs(view.astype(int) - (expected if expected.ndim == 3 else expected[..., None]))
        assert difference.max() <= JPEG_TOLERANCE
        assert difference.mean() < 1.3


def test_an_image_of_one_pixel_fills_its_views(tmp_path):
    color = np.array([[[7, 100, 250]]], np.uint8)
    dataset = open_dataset(write_beton(tmp_path / "pixel.beton", [color] * 4))
    for batch in (*epoch_of(dataset, share=Share(4)), *centered(dataset, np.arange(4), 4)):
        assert torch.equal(batch.views[0], torch.from_numpy(color[0, 0]).expand_as(batch.views[0]))


# Evaluation


@pytest.mark.parametrize("batch_size", [1, 10, 53, 100])
def test_an_eval_pass_gives_all_indices_in_order_and_the_rest_at_last(dataset, batch_size):
    indices = np.arange(NUM_SAMPLES)[::-1]
    batches = list(centered(dataset, indices, batch_size))
    sizes = [len(batch.samples.indices) for batch in batches]
    assert sizes == [len(part) for part in np.split(indices, range(batch_size, NUM_SAMPLES, batch_size))]
    np.testing.assert_array_equal(torch.cat([batch.samples.indices for batch in batches]), indices)
    np.testing.assert_array_equal(torch.cat([batch.samples.labels for batch in batches]), dataset.labels[indices])
    assert {tuple(batch.views[0].shape) for batch in batches} == {(1, size, SIZE, SIZE, 3) for size in sizes}
    assert {batch.draws for batch in batches} == {None}, "nothing is drawn for what is not augmented"


def test_an_eval_pass_over_nothing_gives_nothing(dataset):
    assert list(centered(dataset, np.array([], np.int64), 4)) == []


@pytest.mark.parametrize("fraction", [1.0, 0.875])
def test_evaluation_sees_the_centred_square(dataset, pixels, fraction):
    test = dataset.indices(TEST)
    data = DataConfig(image_size=SIZE, eval_crop=fraction)
    views = torch.cat([batch.views[0][0] for batch in centered(dataset, test, 3, data)])
    for view, sample in zip(views, test, strict=True):
        height, width = pixels[sample].shape[:2]
        side = max(1, round(fraction * min(height, width)))
        box = np.array([(height - side) // 2, (width - side) // 2, side, side])
        expected = resized_by_torchvision(pixels[sample], box, SIZE)
        assert np.abs(view.numpy() - expected).max() < (JPEG_TOLERANCE if dataset.is_jpeg[sample] else 0.51)


# Ownership


def test_a_retained_batch_is_not_overwritten(dataset):
    indices = np.arange(NUM_SAMPLES)
    retained, copies = [], []
    for batch in itertools.chain(epoch_of(dataset), centered(dataset, indices, 8)):
        retained.append(batch)
        samples = batch.samples
        draws = None if batch.draws is None else batch.draws.clone()
        copies.append(
            batch_of(batch.views[0].clone(), samples.labels.clone(), samples.indices.clone(), samples.epoch, draws)
        )
    assert_same(retained, copies)


def test_a_batch_shares_no_memory_with_what_comes_later(dataset):
    indices = np.arange(NUM_SAMPLES)
    labels = dataset.labels.copy()
    expected = [batch.views[0].clone() for batch in centered(dataset, indices, 8)]
    for batch, views in zip(centered(dataset, indices, 8), expected, strict=True):
        assert torch.equal(batch.views[0], views)
        for tensor in (batch.views[0], batch.samples.labels, batch.samples.indices):
            tensor.zero_()
    np.testing.assert_array_equal(indices, np.arange(NUM_SAMPLES))
    np.testing.assert_array_equal(dataset.labels, labels)


# Several sizes

CROPS = AugmentConfig(
    (
        ViewConfig(count=2),
        ViewConfig(count=3, size=5, crop_scale=(0.05, 0.4)),
        ViewConfig(size=40, crop_ratio=(1.0, 1.0)),
    )
)


def test_views_of_several_sizes_are_numbered_through_and_cut_each_to_its_own(dataset, pixels):
    worst = {0: 0.0, 1: 0.0}
    for batch in epoch_of(dataset, augment=CROPS):
        samples = batch.samples.indices.numpy()
        shapes = [tuple(views.shape) for views in batch.views]
        assert shapes == [(count, GLOBAL_BATCH, side, side, 3) for count, side in ((2, SIZE), (3, 5), (1, 40))]
        boxes = random_boxes(dataset, CROPS, seed=0, epoch=0, samples=samples)
        views = [view.numpy() for of_size in batch.views for view in of_size]
        for view, position in itertools.product(range(CROPS.num_views), range(len(samples))):
            sample = samples[position]
            expected = resized_by_torchvision(pixels[sample], boxes[view, position], views[view].shape[1])
            kind = int(dataset.is_jpeg[sample])
            worst[kind] = max(worst[kind], np.abs(views[view][position] - expected).max())
    assert worst[0] < 0.51
    assert worst[1] < JPEG_TOLERANCE


def test_a_views_pixels_do_not_depend_on_the_sizes_of_the_others(dataset):
    one_size, several = CROPS.with_all(size=0), CROPS
    for alike, batch in zip(epoch_of(dataset, augment=one_size), epoch_of(dataset, augment=several), strict=True):
        assert torch.equal(alike.views[0][:2], batch.views[0])


def test_a_box_follows_its_own_groups_scale_and_ratio(dataset):
    samples = np.array([SHAPES.index((150, 120))])
    augment = CROPS.with_all(count=200)
    whole, part, square = random_boxes(dataset, augment, seed=0, epoch=0, samples=samples)[:, 0].reshape(3, 200, 4)
    assert (part[:, 2] * part[:, 3]).max() <= 0.41 * 150 * 120 < (whole[:, 2] * whole[:, 3]).max()
    np.testing.assert_array_equal(square[:, 2], square[:, 3])


# Errors


def pass_with_boxes(
    loader: Loader, boxes: Any, samples: Any = lambda step: np.array([step]), num_steps: int = 10
) -> Batches:
    """Batches of one sample over the small dataset, whose threads call `boxes`."""
    return Batches(loader, Crops([(1, 8)], boxes), samples, steps=range(num_steps))


def epoch_with_boxes(dataset: Dataset, boxes: Any, timeout_s: float = 60) -> Batches:
    return pass_with_boxes(loader_of(dataset, DataConfig(image_size=8, timeout_s=timeout_s)), boxes)


def whole_image(samples: np.ndarray) -> np.ndarray:
    return np.tile(np.array([0, 0, 16, 16]), (1, len(samples), 1))


@pytest.mark.parametrize("cut", [0.6, 0.9])
def test_a_corrupt_jpeg_is_named(tmp_path, cut):
    images: list[np.ndarray | bytes] = [jpeg(picture(64, 64, seed)) for seed in range(12)]
    whole = images[5]
    assert isinstance(whole, bytes)
    images[5] = whole[: int(cut * len(whole))]
    dataset = open_dataset(write_beton(tmp_path / "corrupt.beton", images))
    epoch = centered(dataset, np.arange(12), 2)
    np.testing.assert_array_equal(next(epoch).samples.indices, [0, 1])
    np.testing.assert_array_equal(next(epoch).samples.indices, [2, 3])
    with pytest.raises(RuntimeError, match=r"sample 5 of .*corrupt\.beton is not a readable JPEG"):
        next(epoch)
    with pytest.raises(StopIteration):
        next(epoch)


def test_a_threads_error_reaches_the_consumer_as_itself(small):
    error = ZeroDivisionError("a fault of the boxes")

    def boxes(samples: np.ndarray) -> np.ndarray:
        if samples[0] == 3:
            raise error
        return whole_image(samples)

    with loader_of(small, DataConfig(image_size=8)) as loader_:
        batches = pass_with_boxes(loader_, boxes)
        seen: list[Batch] = []
        with pytest.raises(ZeroDivisionError) as caught:
            seen.extend(batches)
        assert caught.value is error
        assert list(batches) == []
        assert len(list(pass_with_boxes(loader_, whole_image))) == 10, "the threads are there for others"


def test_a_wait_has_a_bound(small):
    assert len(list(epoch_with_boxes(small, whole_image))) == 10  # compiles before the clock matters
    release = threading.Event()

    def boxes(samples: np.ndarray) -> np.ndarray:
        if samples[0] == 1:
            release.wait(60)
        return whole_image(samples)

    # The stuck thread is let go once the consumer has given up on it, so that close() can join it.
    epoch = epoch_with_boxes(small, boxes, timeout_s=0.5)
    assert next(epoch).samples.indices.item() == 0
    timer = threading.Timer(1.5, release.set)
    timer.start()
    with pytest.raises(TimeoutError, match=r"no batch within 0\.5 s"):
        next(epoch)
    timer.join()


def test_a_batch_that_can_not_be_made_is_the_users_error(dataset):
    with pytest.raises(UserError, match=r"^--batch\.global 47 is more than the 46 training samples: .*"):
        epoch_of(dataset, share=Share(47))
    with pytest.raises(
        UserError, match=r"^--batch\.global 10 can't be shared equally by 4 ranks; give a multiple of 4$"
    ):
        Share(10, num_ranks=4)


def test_the_largest_batch_is_the_training_split(dataset):
    (batch,) = epoch_of(dataset, share=Share(NUM_SAMPLES - NUM_TEST))
    np.testing.assert_array_equal(batch.samples.indices.sort().values, dataset.indices(TRAIN))


# Threads


def test_threads_outlive_passes_and_end_with_the_loader(dataset):
    with loader_of(dataset, threads=3) as loader:
        threads = loader_threads()
        assert len(threads) == 3
        assert [len(list(loader.epoch(number))) for number in range(2)] == [3, 3]
        assert len(list(loader.centered(np.arange(5), batch_size=2, image_size=9))) == 3
        assert loader_threads() == threads
    assert loader_threads() == []
    loader.close()


def test_passes_of_one_loader_may_alternate(dataset):
    indices = np.arange(NUM_SAMPLES)
    trained, seen = list(epoch_of(dataset)), list(centered(dataset, indices, 20))
    with loader_of(dataset) as loader:
        pairs = list(zip(loader.epoch(0), loader.centered(indices, batch_size=20), strict=True))
    assert_same([pair[0] for pair in pairs], trained)
    assert_same([pair[1] for pair in pairs], seen)


def test_a_pass_that_is_left_early_lets_go_of_its_batches_and_the_loader_goes_on(dataset):
    expected = global_batches(dataset)
    with loader_of(dataset, DataConfig(image_size=SIZE, batches_ahead=3)) as loader:
        with loader.epoch(0) as batches:
            for _ in batches:
                break
        assert len(batches) == 0
        assert list(batches) == []
        assert_same(list(loader.epoch(0)), expected)


def test_a_pass_that_is_dropped_is_not_filled(small):
    asked, release = [], threading.Event()

    def boxes(samples: np.ndarray) -> np.ndarray:
        asked.extend(samples.tolist())
        release.wait(60)
        return whole_image(samples)

    with loader_of(small, DataConfig(image_size=8, batches_ahead=6), threads=1) as loader:
        batches = pass_with_boxes(loader, boxes)
        while not asked:
            time.sleep(0.01)
        del batches
        release.set()
        assert len(list(pass_with_boxes(loader, whole_image))) == 10
    assert asked == [0]


def test_threads_end_when_the_consumer_fails_in_the_block(dataset):
    with pytest.raises(KeyError, match="the consumer's"), loader_of(dataset) as loader:  # noqa: PT012 - the with is meant
        next(loader.epoch(0))
        raise KeyError("the consumer's")
    assert loader_threads() == []


def test_threads_end_when_the_last_reference_is_dropped(dataset):
    epoch = epoch_of(dataset)
    next(epoch)
    assert len(loader_threads()) == 2
    del epoch
    assert loader_threads() == []


def test_a_loader_within_a_circle_of_references_ends_too(dataset):
    circle: list[Any] = [epoch_of(dataset)]
    circle.append(circle)
    del circle
    gc.collect()
    assert loader_threads() == []


def test_an_error_in_the_order_ends_the_pass_alone(small):
    def samples(step: int) -> np.ndarray:
        return np.array([[0], [1], [2], [10**6]][step])

    with loader_of(small, DataConfig(image_size=8, batches_ahead=2)) as loader:
        batches = pass_with_boxes(loader, whole_image, samples, 4)
        assert next(batches).samples.indices.item() == 0
        with pytest.raises(IndexError):
            next(batches)
        assert list(batches) == []
        assert len(list(pass_with_boxes(loader, whole_image))) == 10


def test_threads_are_those_configured_or_a_fair_share_of_the_cores_but_one():
    assert fair_threads(0) == max(1, fair_cores() - 1), "the loop keeps one core"
    assert fair_threads(5) == 5


def test_packed_file_is_not_needed_by_name_once_it_is_open(tmp_path: Path):
    """Samples are read from the mapped file: replacing the path while a run reads it changes nothing."""
    images = [picture(16, 16, seed) for seed in range(8)]
    path = write_beton(tmp_path / "a.beton", images)
    dataset = open_dataset(path)
    path.unlink()
    (batch,) = centered(dataset, np.arange(8), 8, DataConfig(image_size=16))
    np.testing.assert_array_equal(batch.views[0][0], np.stack(images))


def test_close_does_not_wait_for_ever_for_a_stuck_thread(small, monkeypatch):
    monkeypatch.setattr(loader, "JOIN_TIMEOUT_S", 0.2)
    begun, release = threading.Event(), threading.Event()

    def boxes(samples: np.ndarray) -> np.ndarray:
        begun.set()
        release.wait(60)
        return whole_image(samples)

    loader_ = loader_of(small, DataConfig(image_size=8))
    batches = pass_with_boxes(loader_, boxes)
    assert begun.wait(60)
    batches.close()
    loader_.close()
    stuck = loader_threads()
    assert stuck
    release.set()
    for thread in stuck:
        thread.join(60)
