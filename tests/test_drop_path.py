"""Stochastic depth: its rate and expectation, and that it is a function of the sample's key alone."""

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from dist_contrastive.config import EncoderConfig, HeadConfig, UserError
from dist_contrastive.distributed import rank as own_rank
from dist_contrastive.distributed import world_size
from dist_contrastive.methods.base import MethodSettings
from dist_contrastive.methods.byol import BYOL, BYOLConfig
from dist_contrastive.methods.cpc import CPC, CPCConfig
from dist_contrastive.models.base import Encoder
from dist_contrastive.models.drop_path import KeyedDropPath, PassKeys
from dist_contrastive.models.encoders import build_encoder
from dist_contrastive.models.heads import KeyedDropout
from dist_contrastive.models.teacher import Teacher
from dist_contrastive.rng import sample_keys
from tests.harness import run_ranks
from tests.steps import build, clock_at, gradient_of, share_of_batch, step_gradient, student_of, teacher_of

RATE = 0.4
VIT = EncoderConfig(name="vit_w96_d4", norm="group", drop_path=RATE)
NUM_IMAGES = 6


def keys_of(num_samples: int, view: int = 0) -> Tensor:
    return sample_keys(seed=0, epoch=1, indices=torch.arange(num_samples), view=view)


def images_of(num_samples: int) -> Tensor:
    return torch.randn(num_samples, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def paths_of(encoder: Encoder) -> list[KeyedDropPath]:
    return [module for module in encoder.modules() if isinstance(module, KeyedDropPath)]


def dropping_encoder(config: EncoderConfig = VIT) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(config, 16).train()


def dropped_ones(num_samples: int, probability: float, layer: int) -> Tensor:
    """What a path makes of ones [N], each its sample's."""
    pass_keys = PassKeys()
    path = KeyedDropPath(probability, layer, pass_keys).train()
    with pass_keys.during(keys_of(num_samples)):
        return path(torch.ones(num_samples, 1, 1))[:, 0, 0]


@pytest.mark.parametrize("probability", [0.05, 0.4, 0.9])
def test_a_path_is_dropped_at_its_rate_and_keeps_its_expectation(probability: float) -> None:
    n = 20_000
    out = dropped_ones(n, probability, layer=3)
    kept = out != 0
    # Five standard deviations of n draws; the mean's are those of the share of what is kept, divided by that share.
    deviation = 5 * (probability * (1 - probability) / n) ** 0.5
    assert kept.float().mean().item() == pytest.approx(1 - probability, abs=deviation)
    assert out.mean().item() == pytest.approx(1, abs=deviation / (1 - probability))
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - probability)))


def test_layers_decide_independently() -> None:
    n, layers = 20_000, 6
    kept = torch.stack([dropped_ones(n, RATE, layer) != 0 for layer in range(layers)]).double().numpy()
    assert abs(np.corrcoef(kept) - np.eye(layers)).max() < 5 / n**0.5


@pytest.mark.parametrize(
    "name", ["vit_w96_d4", "resnet10_w16", "deit_tiny_distilled_patch16_224", "test_convnext", "test_efficientnet"]
)
def test_rates_are_those_that_timm_gives(name: str) -> None:
    plain = timm.create_model(name, drop_path_rate=RATE)
    rates = [module.drop_prob for module in plain.modules() if isinstance(module, DropPath)]
    encoder = build_encoder(EncoderConfig(name=name, drop_path=RATE), 32)
    assert [path.probability for path in paths_of(encoder)] == rates
    assert 0 < rates[0] < rates[-1] <= RATE + 1e-6
    assert [path.layer for path in paths_of(encoder)] == list(range(len(rates)))
    assert not [module for module in encoder.modules() if isinstance(module, DropPath)]


def test_what_is_dropped_replays_by_key() -> None:
    encoder, images, keys = dropping_encoder(), images_of(NUM_IMAGES), keys_of(NUM_IMAGES)
    features = encoder(images, keys)
    torch.manual_seed(123)  # whatever torch's own generator does
    assert torch.equal(encoder(images, keys), features)
    assert torch.equal(encoder.features(images, keys=keys).pooled, features)
    # A share of the samples in another order has the same paths.
    torch.testing.assert_close(encoder(images.flip(0)[:4], keys.flip(0)[:4]), features.flip(0)[:4])
    # Another view of the same samples has others.
    assert (encoder(images, keys_of(NUM_IMAGES, view=1)) != features).any(1).any()


def test_in_expectation_a_block_adds_what_it_adds_without_dropping() -> None:
    encoder = dropping_encoder()
    seen: list[tuple[Tensor, Tensor]] = []
    path = paths_of(encoder)[-1]
    path.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    n = 4000
    with torch.no_grad():
        encoder(images_of(1).expand(n, -1, -1, -1), keys_of(n))
    (entered, left) = seen[0]
    kept = left.flatten(1).any(1)
    assert kept.float().mean().item() == pytest.approx(1 - RATE, abs=5 * (RATE * (1 - RATE) / n) ** 0.5)
    torch.testing.assert_close(left[kept], entered[kept] / (1 - RATE))


def test_evaluation_drops_nothing_and_asks_for_no_keys() -> None:
    images = images_of(NUM_IMAGES)
    without = dropping_encoder(EncoderConfig(name="vit_w96_d4", norm="group"))
    assert torch.equal(dropping_encoder().eval()(images), without(images))


def test_training_without_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="in training mode without the keys of its samples"):
        dropping_encoder()(images_of(2))


def test_keys_are_forgotten_after_a_pass() -> None:
    encoder = dropping_encoder()
    encoder(images_of(2), keys_of(2))
    with pytest.raises(ValueError, match="without the keys"):
        encoder.body(images_of(2))
    with pytest.raises(AssertionError, match="divisible by patch size"):
        encoder(torch.zeros(2, 3, 17, 17), keys_of(2))
    with pytest.raises(ValueError, match="without the keys"):
        encoder.body(images_of(2))


def test_without_the_option_nothing_is_dropped_even_where_timm_does() -> None:
    name = "swin_tiny_patch4_window7_224"
    assert any(isinstance(m, DropPath) and m.drop_prob for m in timm.create_model(name).modules())
    encoder = build_encoder(EncoderConfig(name=name), 32).train()
    assert not [m for m in encoder.modules() if isinstance(m, DropPath | KeyedDropPath)]


@pytest.mark.parametrize("name", ["vgg11", "densenet121"])
def test_an_encoder_without_paths_is_refused(name: str) -> None:
    with pytest.raises(UserError) as caught:
        build_encoder(EncoderConfig(name=name, drop_path=0.1), 32)
    assert str(caught.value) == f"--encoder.drop-path 0.1: {name} has no paths that can be dropped; leave it out"


def test_paths_of_parts_of_images_are_refused() -> None:
    encoder = build_encoder(EncoderConfig(name="tnt_s_legacy_patch16_224", drop_path=0.1), 32).train()
    with pytest.raises(UserError, match=r"--encoder.drop-path: the model has paths of \d+ parts of 2 images; give 0"):
        encoder(torch.zeros(2, 3, 32, 32), keys_of(2))


# Ranks, passes, teachers.


def features_of_share(rank: int) -> np.ndarray:
    encoder, images, keys = dropping_encoder(), images_of(NUM_IMAGES), keys_of(NUM_IMAGES)
    size = NUM_IMAGES // world_size()
    share = slice(own_rank() * size, (own_rank() + 1) * size)
    return encoder(images[share], keys[share]).detach().numpy()


def test_two_ranks_drop_what_one_drops() -> None:
    (alone,) = run_ranks(features_of_share, 1)
    np.testing.assert_allclose(np.concatenate(run_ranks(features_of_share, 2)), alone, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        whole = dropping_encoder().eval()(images_of(NUM_IMAGES)).numpy()
    assert abs(whole - alone).max() > 0.01, "something was dropped"


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_micro_batches_drop_what_the_whole_batch_drops_in_both_passes(name: str) -> None:
    gradients, embeddings = [], []
    for micro in (0, 3, 1):
        method = build(name, VIT)
        embeddings.append(step_gradient(method, micro).compute(share_of_batch(method), clock_at(step=2)).embeddings)
        found = gradient_of(method)
        gradients.append(np.concatenate([found[name].ravel() for name in sorted(found)]).astype(np.float64))
    for gradient, embedded in zip(gradients[1:], embeddings[1:], strict=True):
        torch.testing.assert_close(embedded, embeddings[0])
        assert np.linalg.norm(gradient - gradients[0]) <= 1e-5 * np.linalg.norm(gradients[0])


def test_a_teacher_drops_nothing() -> None:
    head = HeadConfig(layers=2, hidden_size=8, output_size=4)
    encoder = EncoderConfig(name="vit_w96_d4", norm="group", drop_path=RATE, dropout=0.5)
    torch.manual_seed(0)
    method = BYOL(
        MethodSettings(BYOLConfig(projector=head), build_encoder(encoder, 16), seed=0, global_batch=8)
    ).train()
    images = images_of(NUM_IMAGES)
    taught = teacher_of(method)(images)
    torch.testing.assert_close(taught, student_of(method).eval()(images))
    assert [path.probability for path in paths_of(method.encoder)] != [0.0] * len(paths_of(method.encoder))
    teacher = Teacher(method.encoder, nn.Sequential(KeyedDropout(0.5))).train()
    (dropout,) = teacher.projector.children()
    assert torch.equal(dropout(torch.ones(4, 8), torch.arange(4)), torch.ones(4, 8))


def test_each_patch_of_cpc_has_paths_of_its_own() -> None:
    encoder = build_encoder(EncoderConfig(name="resnet10_w16", stem="small", norm="group", drop_path=RATE), 16)
    config = CPCConfig(projector=HeadConfig(layers=1, output_size=8), context_size=8, rows_ahead=1)
    method = CPC(MethodSettings(config, encoder, seed=0, global_batch=8)).train()
    seen: list[Tensor] = []

    def note(module: KeyedDropPath, inputs: tuple[Tensor, ...]) -> None:
        assert module.pass_keys.keys is not None
        seen.append(module.pass_keys.keys)

    paths_of(encoder)[0].register_forward_pre_hook(note)
    batch = share_of_batch(method)
    method.embed(batch)
    (keys,) = seen
    assert len(keys.unique()) == len(keys) == batch.views[0].shape[0] * len(batch) * method.side**2
