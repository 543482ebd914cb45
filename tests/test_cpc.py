"""CPC's loss over grids against nested-loop pseudocode of its paper, on one rank and on several; patches, and what a
context may see."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_contrastive import distributed
from dist_contrastive.batch import Batch, Samples
from dist_contrastive.config import EncoderConfig, HeadConfig, UserError
from dist_contrastive.methods.base import Embeddings, MethodSettings
from dist_contrastive.methods.cpc import CPC, CPCConfig
from dist_contrastive.models.encoders import build_encoder
from tests.harness import run_ranks
from tests.steps import losses_of

GROUP = EncoderConfig(name="resnet10_w16", stem="small", norm="group")
SIDE, ROWS_AHEAD, TEMPERATURE = 3, 2, 0.3


def cpc(encoder: EncoderConfig = GROUP, *, image_size: int = 16, **options: Any) -> CPC:
    torch.manual_seed(0)
    projector = HeadConfig(layers=1, output_size=8)
    config = CPCConfig(projector=projector, context_size=8, **options)
    return CPC(MethodSettings(config, build_encoder(encoder, image_size), seed=0, global_batch=8))


def small_grid(encoder: EncoderConfig = GROUP) -> CPC:
    """A grid of 3 × 3 patches, of which two rows are predicted."""
    return cpc(encoder, patch_size=8, patch_stride=4, rows_ahead=ROWS_AHEAD, temperature=TEMPERATURE)


def images(num_views: int, num_samples: int) -> Batch:
    views = torch.randn(num_views, num_samples, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    indices = torch.arange(num_samples)
    return Batch((views,), Samples(indices, indices, epoch=0))


def embeddings(num_views: int, num_samples: int) -> dict[str, Tensor]:
    """As `embed` gives them: unit vectors on the grid, and for each k predictions of the rows from k on."""
    generator = torch.Generator().manual_seed(0)

    def unit(rows: int) -> Tensor:
        x = torch.randn(num_views, num_samples, rows, SIDE, 8, generator=generator)
        return torch.nn.functional.normalize(x, dim=-1)

    return {"z": unit(SIDE), **{f"prediction_{k}": unit(SIDE - k) for k in range(1, ROWS_AHEAD + 1)}}


def cpc_reference(arrays: dict[str, np.ndarray]) -> list[float]:
    """Van den Oord et al. 2018, equation 4, for each k, as loops in float64.

    The candidates of a prediction of row i + k are the patches of all rows that some prediction of this k is about.
    """
    z = arrays["z"]
    num_views, num_samples = z.shape[:2]
    losses = []
    for k in range(1, ROWS_AHEAD + 1):
        targets = [
            (v, n, i, j)
            for v in range(num_views)
            for n in range(num_samples)
            for i in range(k, SIDE)
            for j in range(SIDE)
        ]
        total = 0.0
        for v, n, i, j in targets:
            prediction = arrays[f"prediction_{k}"][v, n, i - k, j]
            denominator = sum(math.exp(float(prediction @ z[t]) / TEMPERATURE) for t in targets)
            total -= float(prediction @ z[v, n, i, j]) / TEMPERATURE - math.log(denominator)
        losses.append(total / len(targets))
    return losses


@pytest.mark.parametrize("num_views", [1, 2])
def test_equals_the_papers_loops(num_views: int) -> None:
    given = embeddings(num_views, 3)
    losses = small_grid().loss(given, images(num_views, 3).samples)
    expected = cpc_reference({name: x.double().numpy() for name, x in given.items()})
    assert [losses[f"{k}_rows_ahead"].item() for k in (1, 2)] == pytest.approx(expected, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(np.mean(expected), rel=1e-5)


def loss_of_share(rank: int, arrays: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    """This rank's loss over its share of the samples, and the gradients at its share averaged as DDP does."""
    num_views, num_samples = arrays["z"].shape[:2]
    share = num_samples // distributed.world_size()
    part = slice(rank * share, (rank + 1) * share)
    mine: Embeddings = {n: torch.from_numpy(x[:, part].copy()).requires_grad_() for n, x in arrays.items()}
    loss = small_grid().loss(mine, images(num_views, num_samples).samples.part(part))["loss"]
    loss.backward()
    gradients = {}
    for name, x in mine.items():
        assert x.grad is not None
        gradients[name] = (x.grad / distributed.world_size()).numpy()
    return loss.item(), gradients


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_give_the_loss_and_gradient_of_the_whole_batch(num_ranks: int) -> None:
    arrays = {name: x.numpy() for name, x in embeddings(2, 4).items()}
    loss, gradients = loss_of_share(0, arrays)
    shares = run_ranks(loss_of_share, num_ranks, arrays)
    assert np.mean([share_loss for share_loss, _ in shares]) == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        found = np.concatenate([share[name] for _, share in shares], axis=1)
        np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-7)


def test_targets_and_predictions_both_get_gradient() -> None:
    """CPC stops no gradient; only the first row is never a target."""
    _, gradients = loss_of_share(0, {name: x.numpy() for name, x in embeddings(1, 3).items()})
    assert not gradients["z"][:, :, 0].any()
    assert (np.abs(gradients["z"][:, :, 1:]).max(-1) > 0).all()
    for k in range(1, ROWS_AHEAD + 1):
        assert (np.abs(gradients[f"prediction_{k}"]).max(-1) > 0).all()


def test_float32_inside_autocast() -> None:
    given, batch = embeddings(2, 3), images(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = small_grid().loss(given, batch.samples)["loss"]
        embedded = small_grid().embed(batch)
    assert loss.dtype == torch.float32
    assert loss.item() == small_grid().loss(given, batch.samples)["loss"].item()
    assert all(x.dtype == torch.float32 for x in embedded.values())


def test_patches_are_the_papers_grid() -> None:
    method = cpc()
    assert (method.patch_size, method.patch_stride, method.side) == (4, 2, 7)
    batch = images(1, 4)
    embeddings = method.embed_all(batch)
    assert embeddings["z"].shape == (1, 4, 7, 7, 8)
    assert embeddings["prediction_3"].shape == (1, 4, 4, 7, 8)
    row, column, sample = 4, 1, 2
    patch = batch.views[0][0, sample : sample + 1, :, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4]
    by_hand = torch.nn.functional.normalize(method.projector(method.encoder(patch)), dim=1)[0]
    torch.testing.assert_close(method.embed_all(batch)["z"][0, sample, row, column], by_hand, rtol=1e-4, atol=1e-5)


def test_a_prediction_sees_the_rows_above_alone() -> None:
    method = cpc()
    z = torch.randn(1, 7, 7, 8, requires_grad=True)
    for k, prediction in enumerate(method.predictions(method.context(z)), start=1):
        assert prediction.shape[1] == 7 - k
        made_at = 3  # row of the context; the prediction is about row made_at + k
        (gradient,) = torch.autograd.grad(prediction[0, made_at, 3].sum(), z, retain_graph=True)
        rows = gradient[0].abs().sum((1, 2))
        assert rows[made_at + 1 :].eq(0).all()
        assert rows[: made_at + 1].gt(0).all()
        assert gradient[0].abs().sum((0, 2)).gt(0).all(), "all columns"


def test_cpc_takes_one_view_and_several() -> None:
    method = cpc()
    batch = images(1, 4)
    (views,) = batch.views
    two = replace(batch, views=(torch.cat([views, views + 1]),))
    one_loss, two_loss = (method.loss(method.embed_all(b), b.samples)["loss"] for b in (batch, two))
    assert method.embed_all(two)["z"].shape[0] == 2
    assert two_loss > one_loss, "twice as many negatives"


def test_pixels_below_a_row_of_patches_do_not_change_what_is_predicted_from_it() -> None:
    method, batch = cpc(), images(1, 2)
    row = 3
    last_pixel = row * method.patch_stride + method.patch_size
    views = batch.views[0].clone()
    views[..., last_pixel:, :] += 1
    before, after = (method.embed(b) for b in (batch, replace(batch, views=(views,))))
    for k in range(1, method.config.rows_ahead + 1):
        change = (after[f"prediction_{k}"] - before[f"prediction_{k}"]).abs().amax((0, 1, 3, 4))
        assert change[: row + 1].max() < 1e-6
        assert change[row + 1 :].numel() == 0 or change[row + 1 :].min() > 1e-6


def test_each_patch_has_its_own_dropout_mask_whatever_the_micro_batch() -> None:
    method, batch = small_grid(replace(GROUP, dropout=0.5)), images(2, 4)
    alike = replace(batch, views=(torch.ones_like(batch.views[0]),))
    z = method.embed(alike)["z"].detach()
    assert len(torch.unique(z.flatten(0, -2).round(decimals=4), dim=0)) == z[..., 0].numel()
    part = slice(1, 3)
    torch.testing.assert_close(method.embed(alike.part(part))["z"], z[:, part], rtol=1e-4, atol=1e-5)


def test_batchnorm_encoders_on_patches_of_four_pixels_train() -> None:
    method, batch = cpc(replace(GROUP, norm="batch")), images(1, 2)
    losses_of(method, batch)["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())


@pytest.mark.parametrize(("image_size", "patch_size", "patch_stride"), [(16, 4, 2), (32, 8, 4), (256, 64, 32)])
def test_the_default_grid_is_the_papers(image_size: int, patch_size: int, patch_stride: int) -> None:
    method = cpc(image_size=image_size)
    assert (method.patch_size, method.patch_stride, method.side) == (patch_size, patch_stride, 7)


def test_the_report_has_the_cosine_of_predictions_and_their_targets() -> None:
    given = embeddings(2, 3)
    z = given["z"].double().numpy()
    cosines = [np.mean(np.sum(given[f"prediction_{k}"].double().numpy() * z[:, :, k:], axis=-1)) for k in (1, 2)]
    report = small_grid().report(given, logged=True)
    assert report["positive_cosine"].item() == pytest.approx(np.mean(cosines), abs=1e-6)
    assert report["effective_rank"] > 1
    assert set(small_grid().report(given, logged=False)) == {"positive_cosine"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 17}, "--method.rows-ahead 3: patches of 17 pixels, .* make 0 rows"),
        ({"patch_size": 8, "patch_stride": 4}, "--method.rows-ahead 3: patches of 8 pixels, 4 apart, make 3 rows"),
        (
            {"patch_size": 6, "patch_stride": 4, "rows_ahead": 1},
            "--data.image-size 16: patches of 6 pixels, 4 apart, never see the last 2; give --data.image-size 14 or "
            "--data.image-size 18 or another --method.patch-stride",
        ),
        (
            {"patch_size": 4, "patch_stride": 6, "rows_ahead": 1},
            "--method.patch-stride 6: patches of 4 pixels would leave gaps; give at most 4",
        ),
        (
            {"image_size": 20},
            "--data.image-size 20: patches of 5 pixels, 2 apart, never see the last 1; give --data.image-size",
        ),
        ({"patch_size": -1}, "--method.patch-size -1: give"),
        ({"patch_stride": -1}, "--method.patch-stride -1: give"),
        ({"rows_ahead": 0}, "--method.rows-ahead 0: give"),
        ({"context_layers": 0}, "--method.context-layers 0: give"),
        ({"temperature": 0.0}, "--method.temperature 0.0: give"),
    ],
)
def test_what_makes_no_grid_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        cpc(**options)
