"""The int8 form of an image graph: static quantization in QDQ form, layer by layer, by ONNX Runtime's own quantizer.

Before that, channels that share a scale are made alike in range (`equalize`). A layer is a convolution, a linear map, or, in a
convolutional network, a sum or a maximum of maps, with the ReLU after it.
"""

import contextlib
import io
import logging
import math
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_contrastive.exporting.equalize import equalized
from dist_contrastive.exporting.preprocessing import PIXELS

if TYPE_CHECKING:
    import onnx

WITH_WEIGHTS = ("Conv", "Gemm", "MatMul")
OF_MAPS = ("Add", "MaxPool")
RELU = "Relu"
PERCENTILE = 99.99
"""Of the calibration images' activations lies within the range that 8 bits resolve; what is beyond is cut."""


@dataclass(frozen=True)
class Layer:
    name: str
    """As the run's method calls it."""
    nodes: tuple[str, ...]
    """Of the graph."""
    num_weights: int


class Int8:
    """Int8 forms of one graph, with any of its layers left in fp32.

    Attributes:
        layers: in the order of the graph.
        full_range: weights have 8 bits; else 7, so that pairs of products fit in 16 bits where the processor adds them up there.
    """

    def __init__(self, graph: "onnx.ModelProto", pixels: Sequence[np.ndarray], *, full_range: bool) -> None:
        """`pixels`: batches float32 [b, 3, S, S] to calibrate on."""
        self._graph, self.full_range = equalized(graph, pixels), full_range
        self.layers = _layers(self._graph)
        self._types = sorted({node.op_type for node in graph.graph.node} & {*WITH_WEIGHTS, *OF_MAPS, RELU})
        self._ranges = self._calibrated(pixels)

    def form(self, in_fp32: Collection[str] = ()) -> "onnx.ModelProto":
        """With the layers of these names in fp32."""
        import onnx
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        copy = onnx.ModelProto()
        copy.CopyFrom(self._graph)
        quantized = [node for layer in self.layers if layer.name not in in_fp32 for node in layer.nodes]
        others = [node.name for node in copy.graph.node if node.name not in quantized]
        options: dict[str, Any] = {
            "MatMulConstBOnly": True,  # not what attention multiplies
            # Their sums leave the kernel as floats at no cost; a convolution's do not.
            "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
        }
        with _quiet():
            quantizer = QDQQuantizer(
                copy, True, not self.full_range, QuantType.QInt8, QuantType.QUInt8, self._ranges, quantized, others,
                self._types, options,
            )  # fmt: skip
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        model: onnx.ModelProto = quantizer.model.model
        return model

    def _calibrated(self, pixels: Sequence[np.ndarray]) -> Any:
        from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self._batches = iter(pixels)

            def get_next(self) -> dict[str, np.ndarray] | None:
                batch = next(self._batches, None)
                return None if batch is None else {PIXELS: batch}

        import onnx

        with tempfile.TemporaryDirectory() as folder, _quiet():
            path = Path(folder) / "graph.onnx"
            onnx.save(self._graph, path)
            calibrator = create_calibrator(
                path, self._types, augmented_model_path=str(Path(folder) / "augmented.onnx"),
                calibrate_method=CalibrationMethod.Percentile, extra_options={"percentile": PERCENTILE},
            )  # fmt: skip
            calibrator.collect_data(Reader())
            return calibrator.compute_data()


def _layers(graph: "onnx.ModelProto") -> list[Layer]:
    nodes = list(graph.graph.node)
    constants = {tensor.name: math.prod(tensor.dims) for tensor in graph.graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for value in node.input:
            readers.setdefault(value, []).append(node)
    # A transformer's sums are its residual stream, which spans too wide a range for 8 bits.
    has_maps = not any(node.op_type == "MatMul" for node in nodes)
    found: dict[str, Layer] = {}
    for node in nodes:
        of_weights = node.op_type in WITH_WEIGHTS and node.input[1] in constants
        of_maps = has_maps and node.op_type in OF_MAPS and not set(node.input) & constants.keys()
        if not (of_weights or of_maps):
            continue
        name = _name(node)
        if name in found:  # a module that is called twice, and sums, which have no module of their own
            name = f"{name} ({node.name})"
        after = readers.get(node.output[0], [])
        relu = [after[0].name] if len(after) == 1 and after[0].op_type == RELU else []
        found[name] = Layer(name, (node.name, *relu), constants[node.input[1]] if of_weights else 0)
    return list(found.values())


def _name(node: Any) -> str:
    """That of the module, from what torch's exporter notes of a node."""
    if node.op_type in WITH_WEIGHTS and node.input[1].endswith(".weight"):
        name: str = node.input[1].removesuffix(".weight")
    else:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "")
        modules = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
        name = modules[-2] if len(modules) > 1 else node.name
    name = name.removeprefix("method.").replace("encoder.body.", "encoder.")
    return name if node.op_type in WITH_WEIGHTS else f"{name} {node.op_type.lower()}"


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer logs to the root, and its calibrator prints."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
