"""Channels of like ranges: the same function, and a nearer int8 form."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from dist_contrastive.config import EncoderConfig
from dist_contrastive.data.eval_view import EvalView
from dist_contrastive.exporting import equalize
from dist_contrastive.exporting.equalize import equalized
from dist_contrastive.exporting.graphs import _graph, image_graph
from dist_contrastive.exporting.model import open_session
from dist_contrastive.exporting.names import EMBEDDING, FEATURE
from dist_contrastive.exporting.preprocessing import PIXELS
from dist_contrastive.exporting.quantize import Int8
from dist_contrastive.trainer import build_method
from tests.betons import picture
from tests.runs import tiny_config

ENCODERS = {
    "resnet18": EncoderConfig(name="resnet18", stem="small"),
    "resnet50": EncoderConfig(name="resnet50", stem="small"),
    "vit": EncoderConfig(name="vit_w96_d4"),
    "convnext": EncoderConfig(name="convnext_atto"),
}


def uneven(name: str) -> tuple[onnx.ModelProto, np.ndarray]:
    """The graph of an encoder whose channels differ in range by orders of magnitude, as trained ones do, and images for it."""
    config = tiny_config(Path("run"), Path("data.beton"), encoder=ENCODERS[name])
    config = replace(config, data=replace(config.data, image_size=32))
    torch.manual_seed(0)
    method = build_method(config).eval().requires_grad_(False)
    for module in method.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.weight.copy_(torch.randn_like(module.weight).mul(0.7).exp())
            module.bias.copy_(0.1 * torch.randn_like(module.bias))
    view = EvalView.of(config.data, config.augment)
    images = view.cut([picture(32, 32, seed) for seed in range(16)])
    return image_graph(method, view), view.normalized(images, torch.device("cpu")).contiguous().numpy()


def outputs(graph: onnx.ModelProto, pixels: np.ndarray) -> dict[str, np.ndarray]:
    names = [FEATURE, EMBEDDING]
    found = open_session(graph.SerializeToString()).run(names, {PIXELS: pixels})
    return dict(zip(names, found, strict=True))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", ENCODERS)
def test_the_function_stays_and_its_int8_form_is_nearer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, pixels = uneven(name)
    expected = outputs(graph, pixels)
    for output, values in outputs(equalized(graph, [pixels]), pixels).items():
        assert error(values, expected[output]) < 1e-4
    errors = []
    for strength in (equalize.STRENGTH, 0.0):
        monkeypatch.setattr(equalize, "STRENGTH", strength)
        form = Int8(graph, [pixels], full_range=True).form()
        errors.append(error(outputs(form, pixels)[FEATURE], expected[FEATURE]))
    assert errors[0] < 0.9 * errors[1]


class OverOtherAxes(nn.Module):
    """What sums over pixels or tokens, or takes the mean of channels: no channel of it is one of what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.after = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 1)
        self.mean_of_maps, self.rows = nn.Conv1d(32, 4, 1), nn.Linear(32, 8)
        self.norm, self.tokens = nn.LayerNorm(32), nn.Linear(1024, 6)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.maps(pixels).relu()
        # As many channels as rows and columns: a mistake would go unnoticed by their numbers.
        feature = self.mean_of_maps(maps.mean(1)).flatten(1)
        along_rows = self.rows(self.after(maps)).flatten(1)
        tokens = self.norm(maps.flatten(2).transpose(1, 2))
        mixed = self.tokens(tokens.transpose(1, 2)).flatten(1)
        return feature, torch.cat([along_rows, mixed], 1)


def test_only_channels_are_scaled_where_other_axes_are_summed_over() -> None:
    torch.manual_seed(0)
    pixels = torch.randn(4, 3, 32, 32)
    graph = _graph(OverOtherAxes().requires_grad_(False), pixels, PIXELS, [FEATURE, EMBEDDING], {0: "n"})
    expected = outputs(graph, pixels.numpy())
    for output, values in outputs(equalized(graph, [pixels.numpy()]), pixels.numpy()).items():
        assert error(values, expected[output]) < 1e-4


def test_weights_that_two_layers_share_are_left_alone() -> None:
    """What suits the one tensor would change what the other reads."""
    graph, pixels = uneven("resnet18")
    by_name = {node.name: node for node in graph.graph.node}
    # Two layers of one shape inside two blocks get one and the same weights.
    first, second = [name for name, node in by_name.items() if node.op_type == "Conv"][1:3]
    by_name[second].input[1] = by_name[first].input[1]
    for output, values in outputs(equalized(graph, [pixels]), pixels).items():
        assert error(values, outputs(graph, pixels)[output]) < 1e-4
