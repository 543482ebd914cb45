"""The graphs of an export: they see images as evaluation does, equal torch for all methods and encoders, and have int8 forms."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dist_contrastive.config import EncoderConfig, TrainConfig
from dist_contrastive.data.eval_view import EvalView
from dist_contrastive.exporting.graphs import image_graph, text_graph, with_preprocessing
from dist_contrastive.exporting.model import open_session
from dist_contrastive.exporting.names import EMBEDDING, FEATURE, IMAGES, TOKENS
from dist_contrastive.exporting.preprocessing import IR_VERSION, OPSET, PIXELS, preprocessing
from dist_contrastive.exporting.quantize import Int8
from dist_contrastive.methods import METHODS
from dist_contrastive.methods.image_text import ImageText
from dist_contrastive.trainer import build_method
from tests.betons import picture
from tests.runs import tiny_config
from tests.steps import with_small

CPU = torch.device("cpu")
ENCODERS = {
    "resnet18": EncoderConfig(name="resnet18", stem="small", norm="group"),
    "vit": EncoderConfig(name="vit_w96_d4"),
    "convnext": EncoderConfig(name="convnext_atto"),
}


@pytest.mark.parametrize(("size", "crop"), [(32, 1.0), (32, 0.8), (15, 0.875), (96, 1.0)])
def test_the_graph_sees_images_as_evaluation_does_to_the_last_bit(size: int, crop: float) -> None:
    view = EvalView(size, crop, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(preprocessing(view), opset_imports=[opset], ir_version=IR_VERSION)
    session = open_session(model.SerializeToString())
    generator = np.random.default_rng(0)
    sides = [1, 2, 9, size - 1, size, size + 1, 2 * size, 5 * size + 3]
    for height, width in [*((side, side) for side in sides), (1, 9), (7, 400), (500, 333), (33, 32)]:
        images = generator.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        (found,) = session.run([PIXELS], {IMAGES: images})
        expected = view.normalized(view.cut(list(images)), CPU)
        # A pixel is a whole number times this; normalizing it may end in another last bit.
        assert float((torch.from_numpy(found) - expected).abs().max()) < 1e-5, (height, width)


def build(config: TrainConfig) -> Any:
    torch.manual_seed(0)
    return build_method(config).eval().requires_grad_(False)


def assert_graphs_equal_torch(config: TrainConfig) -> None:
    method, view = build(config), EvalView.of(config.data, config.augment)
    session = open_session(with_preprocessing(image_graph(method, view), view).SerializeToString())
    for number, shape in enumerate([(37, 50), (1, 1), (8, 5)]):
        images = np.stack([picture(*shape, seed=3 * number + i) for i in range(number + 1)])
        features = method.exported(view.normalized(view.cut(list(images)), CPU))
        expected = {FEATURE: features, EMBEDDING: method.embeddings(features)}
        for name, values in expected.items():
            torch.testing.assert_close(
                torch.from_numpy(session.run([name], {IMAGES: images})[0]), values, atol=1e-4, rtol=0
            )
    if isinstance(method, ImageText):
        length = method.text.config.context
        tokens = torch.randint(1, 300, (length, length)).tril()
        (found,) = open_session(text_graph(method).SerializeToString()).run([EMBEDDING], {TOKENS: tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), method.embed_text(tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_graphs_of_each_method_equal_torch(name: str) -> None:
    """Of what is exported, which may be a teacher; both towers, where there are two."""
    assert_graphs_equal_torch(with_small(tiny_config(Path("run"), Path("data.beton")), name))


@pytest.mark.parametrize("name", ENCODERS)
def test_graphs_of_each_kind_of_encoder_equal_torch_and_have_an_int8_form(name: str) -> None:
    config = tiny_config(Path("run"), Path("data.beton"), encoder=ENCODERS[name])
    config = replace(config, data=replace(config.data, image_size=32))
    assert_graphs_equal_torch(config)
    method, view = build(config), EvalView.of(config.data, config.augment)
    graph = image_graph(method, view)
    images = [picture(32, 32, seed) for seed in range(16)]
    pixels = view.normalized(view.cut(images), CPU).contiguous().numpy()
    forms = Int8(graph, [pixels], full_range=True)
    assert len({layer.name for layer in forms.layers}) == len(forms.layers) > 4
    expected = torch.from_numpy(open_session(graph.SerializeToString()).run([FEATURE], {PIXELS: pixels})[0])
    errors = []
    for in_fp32 in ([], [layer.name for layer in forms.layers[1:]], [layer.name for layer in forms.layers]):
        model = forms.form(in_fp32)
        quantized = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
        assert (quantized > 0) == (len(in_fp32) < len(forms.layers))
        found = open_session(with_preprocessing(model, view).SerializeToString()).run(
            [FEATURE], {IMAGES: np.stack(images)}
        )
        errors.append(float((torch.from_numpy(found[0]) - expected).norm() / expected.norm()))
    assert errors[2] < 1e-5
    assert errors[2] < errors[0] < 0.3
    assert errors[1] < errors[0]


def test_int8_weights_have_a_scale_for_each_channel_and_8_bits_or_7() -> None:
    config = tiny_config(Path("run"), Path("data.beton"))
    view = EvalView.of(config.data, config.augment)
    graph = image_graph(build(config), view)
    pixels = view.normalized(view.cut([picture(16, 16, seed) for seed in range(8)]), CPU).contiguous().numpy()
    for full_range, largest in ((True, 127), (False, 64)):
        model = Int8(graph, [pixels], full_range=full_range).form()
        weights = [tensor for tensor in model.graph.initializer if tensor.name.endswith("weight_quantized")]
        scales = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name.endswith("weight_scale")}
        assert weights
        for tensor in weights:
            values = onnx.numpy_helper.to_array(tensor)
            assert values.dtype == np.int8
            assert np.abs(values.astype(int)).max() <= largest
            assert scales[tensor.name.replace("_quantized", "_scale")].dims[0] in values.shape
