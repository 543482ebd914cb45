"""The augmentation: torchvision's operations with per-sample parameters that depend on the sample alone."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from dist_contrastive import rng
from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import AugmentConfig, ViewConfig
from dist_contrastive.data.augment import Augment, cpu
from dist_contrastive.data.augment.draws import NEVER, NUM_DRAWS, Draw, Drawer, blur_size
from dist_contrastive.data.eval_view import EvalView
from dist_contrastive.rng import Stream

CPU = torch.device("cpu")
# Nothing happens to an image but what a test asks for.
OFF_VIEW = ViewConfig(flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0)
OFF = AugmentConfig((replace(OFF_VIEW, count=2),))
# Everything happens to some of the images.
ALL = AugmentConfig((ViewConfig(blur=0.5, solarize=0.3), ViewConfig(blur=0.9, solarize=0.5)))
# Views without normalization are easier to compare: one level of 255 is 1 / 255.
PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
LEVEL = 1 / 255


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of torch that wait for a busy core make these small operations many times slower."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def configured(config: AugmentConfig, *, mean: Any = None, std: Any = None, **changes: Any) -> AugmentConfig:
    """`config` with the changes in all views."""
    return replace(config.with_all(**changes), mean=mean or config.mean, std=std or config.std)


def random_batch(num: int, side: int, num_views: int = 2, *, epoch: int = 0, seed: int = 0) -> Batch:
    """Random crops with some grey, black and white ones among them."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randint(0, 256, (num_views, num, side, side, 3), generator=generator, dtype=torch.uint8)
    if num > 4:
        views[:, 1] = views[:, 1, ..., :1]
        views[:, 2], views[:, 3] = 0, 255
    indices = torch.randperm(10 * num, generator=generator)[:num]
    return Batch((views,), Samples(indices % 3, indices, epoch))


def part(batch: Batch, chosen: Any) -> Batch:
    return Batch((batch.views[0][:, chosen],), batch.samples.part(chosen))


def each(images: Tensor, parameters: Tensor, operation: Callable[[Tensor, float], Tensor]) -> Tensor:
    return torch.stack([operation(image, p.item()) for image, p in zip(images, parameters, strict=True)])


def view_of(config: AugmentConfig) -> EvalView:
    return EvalView(8, 1.0, config.mean, config.std)


def assert_within_a_level(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < LEVEL


def augmented(config: AugmentConfig, batch: Batch, *, seed: int = 0, device: torch.device = CPU) -> Batch:
    """`batch` with what is drawn for it at `seed`."""
    return Augment(config)(replace(batch, draws=Drawer(config, seed).draw(batch.samples)), device)


def drawn(num: int, **numbers: Any) -> Tensor:
    """Draws [1, num, NUM_DRAWS] of which only `numbers` do anything: a number or [num] each, under the names of `Draw`; `blend`
    is that of a turn and three numbers."""
    draws = torch.zeros(1, num, NUM_DRAWS)
    draws[..., Draw.HUE_TURN], draws[..., Draw.THRESHOLD] = -1, NEVER
    draws[..., Draw.BLEND : Draw.GRAYSCALE : 3] = 1
    turn, *blend = numbers.pop("blend", (0, 1, 0, 0))
    for place, number in enumerate(blend):
        draws[..., Draw.BLEND + 3 * turn + place] = number
    for name, number in numbers.items():
        draws[..., Draw[name.upper()]] = number
    return draws


def operated(images: Tensor, **numbers: Any) -> Tensor:
    """`images` uint8 [n, S, S, 3] with what `drawn` says of the `numbers`, float32 [n, 3, S, S]."""
    samples = Samples(torch.zeros(len(images)), torch.zeros(len(images)), 0)
    batch = Batch((images[None],), samples, draws=drawn(len(images), **numbers))
    return Augment(configured(OFF, **PLAIN))(batch, CPU).views[0][0]


# The operations

SIDES = pytest.mark.parametrize("side", [1, 17, 32])


def crops(num: int, side: int) -> Tensor:
    """uint8 [num, side, side, 3]."""
    return random_batch(num, side, 1).views[0][0]


def as_float(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() / 255


@SIDES
def test_flip_and_grayscale_are_torchvisions(side):
    images = crops(9, side)
    torch.testing.assert_close(operated(images, flip=1), F.horizontal_flip(as_float(images)))
    expected = F.rgb_to_grayscale(as_float(images), num_output_channels=3)
    assert_within_a_level(operated(images, grayscale=1), expected)


@SIDES
@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize(
    ("blend", "reference"),
    [
        (lambda f: (f, 0, 0), F.adjust_brightness),
        (lambda f: (f, 0, 1 - f), F.adjust_contrast),
        (lambda f: (f, 1 - f, 0), F.adjust_saturation),
    ],
)
def test_brightness_contrast_and_saturation_are_torchvisions(side, turn, blend, reference):
    images = crops(12, side)
    factors = torch.linspace(0, 2, 12)
    assert_within_a_level(operated(images, blend=(turn, *blend(factors))), each(as_float(images), factors, reference))


@SIDES
def test_hue_is_torchvisions(side):
    images = crops(21, side)
    shifts = torch.linspace(-0.5, 0.5, 21)
    assert_within_a_level(operated(images, hue_turn=1, hue=shifts), each(as_float(images), shifts, F.adjust_hue))


def test_hue_is_right_where_channels_are_equal_and_at_the_corners_of_the_cube():
    values = torch.tensor([0, 128, 255], dtype=torch.uint8)
    colors = torch.cartesian_prod(values, values, values)
    colors = torch.cat([colors, colors[:9]]).view(1, 6, 6, 3).expand(21, -1, -1, -1).contiguous()
    shifts = torch.linspace(-0.5, 0.5, 21)
    assert_within_a_level(operated(colors, hue_turn=3, hue=shifts), each(as_float(colors), shifts, F.adjust_hue))


@pytest.mark.parametrize("side", [2, 4, 17, 32, 33, 96, 224])
@pytest.mark.parametrize("gray", [0, 1])
def test_blur_is_torchvisions_with_reflect_padding(side, gray):
    images, size = crops(6, side), blur_size(side)
    sigma = torch.tensor([0.1, 0.3, 0.8, 1.5, 2.0, 50.0])
    before = as_float(images)
    before = F.rgb_to_grayscale(before, num_output_channels=3) if gray else before
    expected = each(before, sigma, lambda image, s: F.gaussian_blur(image, kernel_size=[size, size], sigma=[s, s]))
    assert_within_a_level(operated(images, sigma=sigma, grayscale=gray), expected)


@pytest.mark.parametrize(("side", "size"), [(2, 3), (8, 3), (32, 3), (48, 5), (96, 9), (224, 23)])
def test_the_blurs_kernel_is_the_odd_number_nearest_to_a_tenth_of_the_side(side, size):
    assert blur_size(side) == size
    assert abs(size - side / 10) <= 1 or size == 3


@SIDES
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_solarize_is_torchvisions(side, threshold):
    images = crops(9, side)
    torch.testing.assert_close(operated(images, threshold=threshold), F.solarize(as_float(images), threshold))


def test_evaluation_normalizes_as_training_does():
    batch = random_batch(6, 8)
    views = view_of(OFF).normalized(batch.views[0], CPU)
    assert views.shape == (2, 6, 3, 8, 8)
    torch.testing.assert_close(views, augmented(OFF, batch, seed=0).views[0])
    expected = F.normalize(batch.views[0].movedim(-1, -3) / 255, list(OFF.mean), list(OFF.std))
    torch.testing.assert_close(views, expected, atol=1e-5, rtol=1e-5)


def test_displayable_views_are_the_pictures_again():
    batch = random_batch(6, 8)
    assert torch.equal(view_of(ALL).displayable(view_of(ALL).normalized(batch.views[0], CPU)), batch.views[0])
    assert torch.equal(view_of(OFF).displayable(augmented(OFF, batch, seed=0).views[0]), batch.views[0])
    beyond = torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert view_of(ALL).displayable(beyond).flatten().tolist() == [0, 0, 0, 255, 255, 255]


# The whole chain


def reference_view(image: Tensor, config: AugmentConfig, key: Tensor, view: int) -> Tensor:
    """One view of `image` uint8 [S, S, 3] by torchvision's operations, drawn from `key` int64 [1]: [3, S, S]."""

    def number(word: int) -> float:
        return rng.unit(rng.fold(key, word)).item()

    def happens(stream: Stream, probability: float) -> bool:
        return number(stream) < probability

    side, (mean, std) = image.shape[0], (config.mean, config.std)
    of_view = [group for group in config.groups for _ in range(group.count)][view]
    out = image.permute(2, 0, 1) / 255
    if happens(Stream.FLIP, of_view.flip):
        out = F.horizontal_flip(out)
    if happens(Stream.JITTER, of_view.jitter):
        adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        strengths = (of_view.brightness, of_view.contrast, of_view.saturation, of_view.hue)
        for turn in sorted(range(4), key=lambda k: number(Stream.JITTER + 5 + k)):
            low = -strengths[turn] if turn == 3 else 1 - strengths[turn]
            high = strengths[turn] if turn == 3 else 1 + strengths[turn]
            out = adjust[turn](out, low + (high - low) * number(Stream.JITTER + 1 + turn))
    if happens(Stream.GRAYSCALE, of_view.grayscale):
        out = F.rgb_to_grayscale(out, num_output_channels=3)
    if happens(Stream.BLUR, of_view.blur) and side > 1:
        low, high = of_view.blur_sigma
        sigma = low + (high - low) * number(Stream.BLUR + 1)
        size = max(3, 2 * round((side / 10 - 1) / 2) + 1)
        out = F.gaussian_blur(out, kernel_size=[size, size], sigma=[sigma, sigma])
    if happens(Stream.SOLARIZE, of_view.solarize):
        out = F.solarize(out, of_view.solarize_threshold)
    return F.normalize(out, list(mean), list(std))


@pytest.mark.parametrize("side", [1, 2, 17, 32])
def test_views_are_what_torchvision_makes_of_each_sample_with_its_own_parameters(side):
    config = configured(ALL, **PLAIN)
    batch = random_batch(40, side, epoch=4)
    views = augmented(config, batch, seed=9).views[0]
    for view in range(2):
        for position, index in enumerate(batch.samples.indices):
            key = rng.sample_keys(9, 4, index.view(1), view)
            expected = reference_view(batch.views[0][view, position], config, key, view)
            assert_within_a_level(views[view, position], expected)


UNLIKE = AugmentConfig(
    (
        ViewConfig(flip=0.3, jitter=1.0, brightness=0.9, hue=0.0, blur=1.0, blur_sigma=(0.1, 0.3)),
        ViewConfig(count=2, jitter=0.9, contrast=0.0, saturation=0.0, hue=0.4, blur=0.7, blur_sigma=(1.0, 3.0)),
        ViewConfig(
            jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, solarize=0.8, solarize_threshold=0.21
        ),
        ViewConfig(count=0),
        ViewConfig(grayscale=0.9, solarize=0.9, solarize_threshold=0.71),
    ),
    **PLAIN,
)


def test_groups_of_one_tensor_have_parameters_of_their_own():
    batch = random_batch(30, 12, UNLIKE.num_views)
    views = augmented(UNLIKE, batch, seed=5).views[0]
    for view in range(UNLIKE.num_views):
        for position, index in enumerate(batch.samples.indices):
            key = rng.sample_keys(5, 0, index.view(1), view)
            expected = reference_view(batch.views[0][view, position], UNLIKE, key, view)
            assert_within_a_level(views[view, position], expected)


def test_views_of_several_sizes_are_numbered_through():
    """Each tensor holds what its views would be as part of one alone, with the numbers that follow those before it."""
    whole = random_batch(10, 8, UNLIKE.num_views)
    cuts = [whole.views[0][:2], whole.views[0][2:3], whole.views[0][3:]]
    apart = augmented(UNLIKE, replace(whole, views=tuple(cuts)), seed=5)
    assert [len(views) for views in apart.views] == [2, 1, 2]
    assert torch.equal(torch.cat(apart.views), augmented(UNLIKE, whole, seed=5).views[0])


def test_views_have_the_documented_shape_and_layout():
    batch = random_batch(6, 8)
    result = augmented(ALL, batch, seed=0)
    assert result.views[0].shape == (2, 6, 3, 8, 8)
    assert result.views[0].dtype == torch.float32
    assert result.views[0].flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result.samples.labels, batch.samples.labels)
    assert torch.equal(result.samples.indices, batch.samples.indices)
    assert result.samples.epoch == batch.samples.epoch
    assert batch.views[0].dtype == torch.uint8


def test_the_batch_it_was_given_stays_as_it_is():
    batch = random_batch(20, 8)
    copy = batch.views[0].clone()
    augmented(ALL, batch, seed=0)
    assert torch.equal(batch.views[0], copy)


@pytest.mark.parametrize("strength", ["brightness", "contrast", "saturation", "hue"])
def test_a_jitter_of_one_strength_changes_that_alone(strength):
    zeros: dict[str, Any] = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    config = configured(OFF, jitter=1.0, **(zeros | {strength: 0.4}), **PLAIN)
    batch = random_batch(10, 8)
    views = augmented(config, batch, seed=1).views[0]
    for view in range(2):
        for position, index in enumerate(batch.samples.indices):
            key = rng.sample_keys(1, 0, index.view(1), view)
            assert_within_a_level(
                views[view, position], reference_view(batch.views[0][view, position], config, key, view)
            )
    without = augmented(configured(OFF, jitter=1.0, **zeros, **PLAIN), batch, seed=1).views[0]
    assert_within_a_level(without, view_of(config).normalized(batch.views[0], CPU))


# Randomness


@pytest.mark.parametrize("side", [1, 2, 17, 31, 32, 33, 96])
def test_an_image_does_not_depend_on_the_batch_around_it(side):
    batch = random_batch(37, side)
    views = augmented(ALL, batch, seed=2).views[0]
    shuffled = torch.from_numpy(rng.permutation(0, 0, 37))
    assert torch.equal(augmented(ALL, part(batch, shuffled), seed=2).views[0], views[:, shuffled])
    for chosen in (slice(0, 1), slice(5, 6), slice(36, 37), slice(0, 18), slice(18, 37), slice(3, 10)):
        assert torch.equal(augmented(ALL, part(batch, chosen), seed=2).views[0], views[:, chosen])


@pytest.mark.parametrize("side", [1, 17, 32, 33])
def test_an_image_does_not_depend_on_the_threads(side, monkeypatch):
    batch = random_batch(37, side)
    views = augmented(ALL, batch, seed=2).views[0]
    monkeypatch.setattr(cpu, "MIN_PIXELS_A_THREAD", 1)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(augmented(ALL, batch, seed=2).views[0], views)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_split_over_ranks_gives_the_same_views(num_ranks):
    batch = random_batch(24, 32)
    whole = augmented(ALL, batch, seed=2).views[0]
    share = 24 // num_ranks
    parts = [
        augmented(ALL, part(batch, slice(rank * share, (rank + 1) * share)), seed=2).views[0]
        for rank in range(num_ranks)
    ]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_views_are_a_pure_function_of_seed_epoch_index_and_view():
    batch = random_batch(40, 16)
    same = Batch((batch.views[0][:1].expand(2, -1, -1, -1, -1).contiguous(),), batch.samples)
    views = augmented(ALL, same, seed=2).views[0]
    torch.manual_seed(99)
    assert torch.equal(augmented(ALL, same, seed=2).views[0], views)
    assert torch.equal(augmented(ALL, same, seed=2).views[0], views)

    def num_equal(other: Tensor) -> int:
        return int((other == views).flatten(2).all(-1).sum())

    unlucky = 20  # of 80: those to which nothing or only a flip happens both times
    assert num_equal(augmented(ALL, same, seed=3).views[0]) < unlucky
    assert num_equal(augmented(ALL, replace(same, samples=replace(same.samples, epoch=1)), seed=2).views[0]) < unlucky
    others = replace(same.samples, indices=same.samples.indices + 1)
    assert num_equal(augmented(ALL, replace(same, samples=others), seed=2).views[0]) < unlucky
    assert num_equal(views.flip(0)) < unlucky


PROBABILITIES = ["flip", "jitter", "grayscale", "blur", "solarize"]


def changed_to(name: str, value: Any) -> dict[str, Any]:
    return {name: value}


@pytest.mark.parametrize("name", PROBABILITIES)
def test_probabilities_hold_for_each_view(name):
    """At 0 and 1 exactly, in between to five standard deviations of 3,000 samples."""
    num, wanted = 3000, (0.0, 0.3, 0.8, 1.0)
    groups = [replace(OFF_VIEW, blur_sigma=(1.0, 2.0), **changed_to(name, probability)) for probability in wanted]
    config = AugmentConfig(tuple(groups), **PLAIN)
    image = torch.tensor([[[10, 60, 200], [90, 20, 30]], [[250, 140, 70], [5, 180, 110]]], dtype=torch.uint8)
    views = image.expand(4, num, 2, 2, 3).contiguous()
    batch = Batch((views,), Samples(torch.zeros(num, dtype=torch.int64), torch.arange(num), epoch=0))
    before = view_of(config).normalized(views, CPU)
    changed = (augmented(config, batch, seed=0).views[0] - before).abs().flatten(2).amax(-1) > 1e-3
    for view, probability in enumerate(wanted):
        tolerance = 5 * math.sqrt(probability * (1 - probability) / num)
        assert changed[view].float().mean().item() == pytest.approx(probability, abs=tolerance)


@pytest.mark.parametrize("name", PROBABILITIES)
def test_a_groups_probability_holds_for_all_its_views(name):
    view = replace(OFF_VIEW, **changed_to(name, 0.6))
    config, each_view = AugmentConfig((replace(view, count=3),)), AugmentConfig((view, replace(view, count=2)))
    batch = random_batch(30, 8, num_views=3)
    assert torch.equal(augmented(config, batch, seed=0).views[0], augmented(each_view, batch, seed=0).views[0])


def chance(probability: float) -> dict[str, Any]:
    return dict.fromkeys(PROBABILITIES, probability)


def test_what_is_drawn_is_independent_of_each_other():
    """The choices and the numbers, each a column; those of operations that are not chosen are not drawn."""
    num = 4000
    samples = Samples(torch.zeros(num), torch.arange(num), 0)
    chances = AugmentConfig(2 * (replace(OFF_VIEW, **chance(0.5)),))
    always = AugmentConfig(2 * (ViewConfig(**chance(1.0)),))
    columns: list[Tensor] = []
    for draws in Drawer(chances, 0).draw(samples):
        columns += (draws[:, place] > 0.6 for place in (Draw.FLIP, Draw.GRAYSCALE, Draw.SIGMA))
        columns += draws[:, Draw.THRESHOLD] < NEVER, draws[:, Draw.HUE_TURN] >= 0
    for draws in Drawer(always, 1).draw(samples):
        columns += draws[:, [Draw.HUE, Draw.HUE_TURN, Draw.SIGMA]].T
    table = torch.stack(columns).float()
    correlations = torch.corrcoef(table) - torch.eye(len(table))
    assert correlations.abs().max() < 5 / math.sqrt(num)


def test_each_order_of_the_jitter_is_as_likely():
    num = 6000
    samples = Samples(torch.zeros(num), torch.arange(num), 0)
    (draws,) = Drawer(AugmentConfig((ViewConfig(jitter=1.0),)), 0).draw(samples)
    blends = draws[:, Draw.BLEND : Draw.GRAYSCALE].unflatten(1, (4, 3))
    contrast, saturation = (blends[..., column].abs().argmax(1) for column in (2, 1))
    orders = 16 * draws[:, Draw.HUE_TURN].long() + 4 * contrast + saturation
    counts = orders.unique(return_counts=True)[1]
    assert len(counts) == 24, "each order of four operations"
    assert stats.chisquare(counts).pvalue > 1e-4


# CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("side", [1, 17, 32, 224])
def test_cuda_gives_what_the_cpu_gives(side):
    config = configured(ALL, **PLAIN)
    batch = random_batch(40, side)
    cuda = augmented(config, batch, seed=2, device=torch.device("cuda"))
    assert {tensor.device.type for tensor in (cuda.views[0], cuda.samples.labels, cuda.samples.indices)} == {"cuda"}
    assert cuda.views[0].flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert_within_a_level(cuda.views[0].cpu(), augmented(config, batch, seed=2).views[0])
    assert torch.equal(cuda.samples.indices.cpu(), batch.samples.indices)
