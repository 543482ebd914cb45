"""ONNX graphs of a run's towers. What torch exports sees normalized squares; the way from images to these is put before it."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_contrastive.config import UserError
from dist_contrastive.data.eval_view import EvalView
from dist_contrastive.exporting.names import EMBEDDING, FEATURE, TOKENS
from dist_contrastive.exporting.preprocessing import IR_VERSION, OPSET, PIXELS, preprocessing
from dist_contrastive.methods import Method
from dist_contrastive.methods.image_text import ImageText

if TYPE_CHECKING:
    import onnx

_OURS, _TORCHS = "given_", "torch_"
"""Torch calls values after its operations, and one of these is `embedding`, too."""


class _ImageTower(nn.Module):
    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        # The encoder's own `forward` looks at the number of images, which would make it a constant.
        features: Tensor = self.method.exported.body(pixels).float()
        return features, self.method.embeddings(features)


class _TextTower(nn.Module):
    def __init__(self, method: ImageText[Any]) -> None:
        super().__init__()
        self.method = method

    def forward(self, tokens: Tensor) -> Tensor:
        return self.method.embed_text(tokens)


def image_graph(method: Method, view: EvalView) -> "onnx.ModelProto":
    """From `PIXELS` float32 [n, 3, S, S] to `FEATURE` and `EMBEDDING`; BatchNorm is part of the convolutions before it."""
    pixels = torch.zeros(2, 3, view.size, view.size)
    return _graph(_ImageTower(method), pixels, PIXELS, [FEATURE, EMBEDDING], {0: "n"})


def text_graph(method: ImageText[Any]) -> "onnx.ModelProto":
    """From `TOKENS` int64 [n, L] to `EMBEDDING`."""
    length = method.text.config.context
    tokens = torch.ones(2, length, dtype=torch.int64)
    return _graph(_TextTower(method), tokens, TOKENS, [EMBEDDING], {0: "n"})


def with_preprocessing(graph: "onnx.ModelProto", view: EvalView) -> "onnx.ModelProto":
    """An `image_graph`, or its int8 form, that takes images of any size."""
    import onnx

    whole = onnx.ModelProto()
    whole.CopyFrom(graph)
    first = preprocessing(view)
    nodes = list(whole.graph.node)
    del whole.graph.node[:], whole.graph.input[:]
    whole.graph.node.extend([*first.node, *nodes])
    whole.graph.initializer.extend(first.initializer)
    whole.graph.input.extend(first.input)
    # The shapes of what lies between are of use while a graph is quantized; ONNX Runtime finds them by itself.
    del whole.graph.value_info[:]
    onnx.checker.check_model(whole)
    return whole


def _graph(
    module: nn.Module, example: Tensor, name: str, outputs: Sequence[str], dynamic: dict[int, str]
) -> "onnx.ModelProto":
    # In channels_last a layer that flattens maps would see them in that order.
    module = copy.deepcopy(module).cpu().to(memory_format=torch.contiguous_format).eval()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation of torch's own for a block, which ONNX has not
    said = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, (example,), dynamo=True, opset_version=OPSET, verbose=False,
                input_names=[name], output_names=[f"{_OURS}{output}" for output in outputs],
                dynamic_shapes=({axis: torch.export.Dim(dim) for axis, dim in dynamic.items()},),
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        raise UserError(f"ONNX can't say what this model computes ({reason[0] if reason else error})") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert program is not None
    graph = program.model_proto
    graph.ir_version = IR_VERSION
    _rename(graph.graph, {output: f"{_TORCHS}{output}" for output in outputs})
    _rename(graph.graph, {f"{_OURS}{output}": output for output in outputs})
    return graph


def _rename(graph: "onnx.GraphProto", names: dict[str, str]) -> None:
    """Give values other names; what torch exports has no graphs within the graph."""
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
    for value in [*graph.output, *graph.value_info]:
        value.name = names.get(value.name, value.name)
