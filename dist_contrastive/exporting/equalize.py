"""Channels of one tensor made alike in range before they are quantized together: the same function, resolved better by 8 bits.

What is quantized with one scale for all channels loses those that are small. Where only sums, ReLUs, maxima and means lie
between the layers that write a tensor and those that read it, each channel c can be divided by s[c] > 0 as it is written and
multiplied by it as it is read, in the weights, at no cost. Nagel et al., Data-free quantization through weight equalization and
bias correction, 2019, section 4.1, with ranges of activations in place of those of weights, as Xiao et al., SmoothQuant, 2023,
equation 4, have it for what reads a LayerNorm. A residual stream, which many layers write and read, is one such tensor.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_contrastive.exporting.model import open_session
from dist_contrastive.exporting.preprocessing import PIXELS

if TYPE_CHECKING:
    import onnx

KEEP_CHANNELS = ("Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Transpose", "Identity")
"""f(s · x) = s · f(x) for s > 0, channel by channel."""
STRENGTH = 0.75
"""s[c] is the channel's range to this power: 1 makes all ranges alike, and the weights that read them less alike."""
LEAST_RANGE = 1e-3
"""Of the widest channel's range: narrower ones are not widened further."""


@dataclass
class _Shared:
    """Tensors that have their channels in common."""

    values: list[str] = field(default_factory=list)
    writers: list[Any] = field(default_factory=list)
    readers: list[tuple[Any, str]] = field(default_factory=list)
    """Nodes outside, and what of it they read."""


def equalized(graph: "onnx.ModelProto", pixels: Sequence[np.ndarray]) -> "onnx.ModelProto":
    """An image graph that computes what `graph` does, with channels of like ranges wherever that costs nothing; `pixels`: batches
    float32 [b, 3, S, S] that show the ranges."""
    import onnx
    from onnx import numpy_helper

    model = onnx.ModelProto()
    model.CopyFrom(graph)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    names = [name for node in model.graph.node for name in node.input]
    own = {name for name in weights if names.count(name) == 1}
    axes = _channel_axes(model.graph, weights)
    groups = [group for group in _shared(model.graph, weights, axes) if _is_free(group, own, axes, model.graph)]
    ranges = _ranges(graph, [value for group in groups for value in group.values], axes, pixels)
    for group in groups:
        of_values = [ranges[value] for value in group.values]
        if len({found.shape for found in of_values}) > 1:  # a sum of what has channels and what has one number for all
            continue
        widest = np.max(of_values, axis=0)
        if not 0 < widest.max() < np.inf:
            continue
        scale = np.maximum(widest, LEAST_RANGE * widest.max()) ** STRENGTH
        scale = (scale / np.exp(np.log(scale).mean())).astype(np.float32)
        for node in group.writers:
            for name in node.input[1:]:
                weights[name] = weights[name] / _along(scale, weights[name].ndim, 0)
        for node, value in group.readers:
            axis = _input_axis(node, value, own, axes, model.graph)
            if axis is not None:
                weights[node.input[1]] = weights[node.input[1]] * _along(scale, weights[node.input[1]].ndim, axis)
        others: dict[str, list[str]] = {}
        for node, value in group.readers:
            if _input_axis(node, value, own, axes, model.graph) is None:
                others.setdefault(value, []).append(node.name)
        for value, readers in others.items():
            factor = f"{value}_range"
            weights[factor] = _along(scale, _rank(model.graph, value), axes[value])
            _multiply(model.graph, value, factor, readers)
    del model.graph.initializer[:]
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


def _channel_axes(graph: "onnx.GraphProto", weights: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Of each value that has channels, on which axis."""
    found: dict[str, int] = {}
    for node in graph.node:
        keeps = node.op_type in (*KEEP_CHANNELS, "Add")
        before = next((found[value] for value in node.input if value in found), None) if keeps else None
        if node.op_type in ("Conv", "Gemm"):
            axis: int | None = 1
        elif node.op_type == "LayerNormalization":
            axis = _rank(graph, node.output[0]) - 1
        elif node.op_type == "Transpose" and before is not None:
            axis = list(_attribute(node, "perm", ())).index(before)
        elif node.op_type == "ReduceMean" and before is not None:
            reduced = _reduced_axes(graph, node, weights)
            gone = 0 if _attribute(node, "keepdims", 1) else sum(place < before for place in reduced)
            axis = None if before in reduced else before - gone
        else:
            axis = before
        for value in node.output:
            if axis is not None:
                found[value] = axis
    return found


def _reduced_axes(graph: "onnx.GraphProto", node: Any, weights: Mapping[str, np.ndarray]) -> set[int]:
    """Over which axes of its input `node` takes the mean."""
    rank = _rank(graph, node.input[0])
    given = weights[node.input[1]].tolist() if len(node.input) > 1 and node.input[1] in weights else None
    axes = given if given is not None else _attribute(node, "axes", range(rank))
    return {axis % rank for axis in axes} if rank else set()


def _shared(graph: "onnx.GraphProto", weights: Mapping[str, np.ndarray], axes: Mapping[str, int]) -> list[_Shared]:
    """All that the graph computes, what has channels in common together; without what it gives."""
    parents: dict[str, str] = {}

    def root(value: str) -> str:
        while parents.setdefault(value, value) != value:
            value = parents[value]
        return value

    inner = set()
    for node in graph.node:
        is_sum = node.op_type == "Add" and not set(node.input) & weights.keys()
        if (node.op_type in KEEP_CHANNELS and node.output[0] in axes) or is_sum:
            inner.add(node.name)
            for value in node.input if is_sum else node.input[:1]:
                parents[root(value)] = root(node.output[0])
    found: dict[str, _Shared] = {}
    for node in graph.node:
        for value in node.output:
            group = found.setdefault(root(value), _Shared())
            group.values.append(value)
            group.writers.extend([] if node.name in inner else [node])
        for value in node.input:
            if node.name not in inner and value not in weights:
                found.setdefault(root(value), _Shared()).readers.append((node, value))
    ends = {root(value.name) for value in (*graph.input, *graph.output)}
    return [group for name, group in found.items() if name not in ends and group.writers]


def _is_free(group: _Shared, own: Set[str], axes: Mapping[str, int], graph: "onnx.GraphProto") -> bool:
    """Whether its channels can be scaled: all that write it do so by weights of their own with a row a channel, and all that read
    it have weights of their own a channel, or read what is pooled, which costs next to nothing to scale."""
    for node in group.writers:
        by_rows = node.op_type in ("Conv", "LayerNormalization") or (node.op_type == "Gemm" and _is_transposed(node))
        if not by_rows or not set(node.input[1:]) <= own:
            return False
        if node.op_type == "LayerNormalization" and _attribute(node, "axis", -1) not in (-1, axes[node.output[0]]):
            return False
    return all(value in axes for value in group.values) and all(
        _input_axis(node, value, own, axes, graph) is not None or _is_pooled(graph, value, axes[value])
        for node, value in group.readers
    )


def _input_axis(node: Any, value: str, own: Set[str], axes: Mapping[str, int], graph: "onnx.GraphProto") -> int | None:
    """On which axis the weights of `node` have the channels of `value`; None where they have not, or it sums over others."""
    if len(node.input) < 2 or node.input[0] != value or node.input[1] not in own:
        return None
    if node.op_type == "Conv":
        return 1 if axes[value] == 1 and _attribute(node, "group", 1) == 1 else None
    if node.op_type == "Gemm":
        return 1 if axes[value] == 1 and _is_transposed(node) else None
    return 0 if node.op_type == "MatMul" and axes[value] == _rank(graph, value) - 1 else None


def _is_transposed(node: Any) -> bool:
    """Whether a Gemm's weights have a row for each of its outputs."""
    return bool(_attribute(node, "transB", 0)) and not _attribute(node, "transA", 0)


def _is_pooled(graph: "onnx.GraphProto", value: str, axis: int) -> bool:
    """Whether `value` has a single number for each image and channel."""
    sizes = [dimension.dim_value for dimension in _shape(graph, value)]
    return len(sizes) > axis and all(size == 1 for place, size in enumerate(sizes) if place not in (0, axis))


def _shape(graph: "onnx.GraphProto", value: str) -> Sequence[Any]:
    found = (info.type.tensor_type.shape.dim for info in (*graph.value_info, *graph.output) if info.name == value)
    return list(next(found, ()))


def _rank(graph: "onnx.GraphProto", value: str) -> int:
    return len(_shape(graph, value))


def _attribute(node: Any, name: str, default: Any) -> Any:
    from onnx.helper import get_attribute_value

    return next((get_attribute_value(found) for found in node.attribute if found.name == name), default)


def _along(scale: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """`scale` [C] as an array of `rank` axes that has it on `axis`."""
    return scale.reshape([-1 if place == axis else 1 for place in range(rank)])


def _multiply(graph: "onnx.GraphProto", value: str, factor: str, names: Sequence[str]) -> None:
    """Let the nodes of these `names` read `value` times the initializer `factor`."""
    from onnx import helper

    scaled = f"{value}_unscaled"
    places = [place for place, node in enumerate(graph.node) if node.name in names]
    for place in places:
        node = graph.node[place]
        node.input[:] = [scaled if name == value else name for name in node.input]
    graph.node.insert(places[0], helper.make_node("Mul", [value, factor], [scaled], name=scaled))


def _ranges(
    graph: "onnx.ModelProto", values: Sequence[str], axes: Mapping[str, int], pixels: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """The largest magnitude in each channel of `values`; of what only a ReLU reads nothing, as it is never quantized."""
    import onnx
    from onnx import helper

    readers: dict[str, list[str]] = {}
    for node in graph.graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node.op_type)
    seen = onnx.ModelProto()
    seen.CopyFrom(graph)
    del seen.graph.output[:]
    seen.graph.output.extend(helper.make_empty_tensor_value_info(value) for value in values)
    session = open_session(seen.SerializeToString())
    found: dict[str, np.ndarray] = {}
    for batch in pixels if values else ():
        for value, array in zip(values, session.run(values, {PIXELS: batch}), strict=True):
            others = tuple(place for place in range(array.ndim) if place != axes[value])
            largest = np.abs(array).max(axis=others) * (readers.get(value) != ["Relu"])
            found[value] = np.maximum(found.get(value, largest), largest)
    return found
