"""Autograd's backward walk in Python.

torch's engine asks for CUDA streams as soon as a gradient is on a GPU, which a machine without one does not have. The walk does
what the engine does, in the same order: gradients are equal bit for bit, and so is the memory that is held on the way. What it
leaves out: hooks on tensors and nodes, but those that run when a leaf has its gradient; sparse gradients, gradients of gradients.
"""

import heapq
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from dist_contrastive.simulate.patches import attribute, patched

Node = Any
"""An operation of the graph; torch's C++ nodes and those of a `torch.autograd.Function` have no common type."""


class _Saved:
    """A tensor that was saved for backward; let go once its node is done, as the engine does."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor


class _Walk:
    """What replaces the engine within `python_engine`."""

    def __init__(self) -> None:
        self._read: list[_Saved] = []
        """What the node that runs has read of what was saved for it."""

    def unpack(self, saved: _Saved) -> Tensor:
        assert saved.tensor is not None, "backward a second time through a graph that was let go"
        self._read.append(saved)
        return saved.tensor

    def run(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        keep_graph: bool,
        create_graph: bool,
        inputs: Sequence[Tensor] = (),
        allow_unreachable: bool = True,
        accumulate_grad: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """The signature of torch's `_engine_run_backward`: gradients of `inputs`, or into the leaves' `grad`."""
        assert not create_graph, "the walk takes no gradients of gradients"
        roots = [get_gradient_edge(output) for output in outputs]
        wanted = {_place(get_gradient_edge(x)): number for number, x in enumerate(inputs)}
        found: list[Tensor | None] = [None] * len(inputs)
        waiting_for = _count_uses([edge.node for edge in roots])
        arrived: dict[Node, dict[int, Tensor]] = {}
        ready: list[tuple[int, int, Node]] = []

        def push(node: Node) -> None:
            # The node that was recorded last goes first; of those without a number, the one that was ready first.
            number = node._sequence_nr() if hasattr(node, "_sequence_nr") else sys.maxsize
            heapq.heappush(ready, (-number, len(pushed), node))
            pushed.append(node)

        pushed: list[Node] = []
        for edge, output, gradient in zip(roots, outputs, gradients, strict=True):
            _arrive(arrived, edge.node, edge.output_nr, torch.ones_like(output) if gradient is None else gradient)
        for node in dict.fromkeys(edge.node for edge in roots):
            if node not in waiting_for:
                push(node)
        outer_read = self._read
        with torch.no_grad():
            while ready:
                node = heapq.heappop(ready)[2]
                held = arrived.pop(node, {})
                for number in held:
                    if (node, number) in wanted:
                        found[wanted[node, number]] = held[number]
                if type(node).__name__ == "AccumulateGrad":
                    if accumulate_grad and not inputs and held:
                        _into_leaf(node.variable, held)
                        for hook in (node.variable._post_accumulate_grad_hooks or {}).values():
                            hook(node.variable)
                    continue
                self._read = []
                results = _apply(node, held)
                if not keep_graph:
                    for saved in self._read:
                        saved.tensor = None
                del held
                for number, (following, input_number) in enumerate(node.next_functions):
                    if following is None:
                        continue
                    if results:
                        gradient, results[number] = results[number], None
                        _arrive(arrived, following, input_number, gradient)
                        del gradient
                    waiting_for[following] -= 1
                    if not waiting_for[following]:
                        push(following)
        self._read = outer_read
        return tuple(found)


def _place(edge: Any) -> tuple[Node, int]:
    return edge.node, edge.output_nr


def _count_uses(roots: Sequence[Node]) -> dict[Node, int]:
    """From how many edges each node below `roots` gets its gradient."""
    uses: dict[Node, int] = {}
    seen, stack = set(roots), list(roots)
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None:
                uses[following] = uses.get(following, 0) + 1
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
    return uses


def _arrive(arrived: dict[Node, dict[int, Tensor]], node: Node, number: int, gradient: Tensor | None) -> None:
    """Add a gradient to what has arrived for output `number` of `node`."""
    held = arrived.setdefault(node, {})
    if gradient is None:
        return
    expected = node._input_metadata[number]
    if tuple(gradient.shape) != tuple(expected.shape):
        gradient = gradient.sum_to_size(expected.shape)
    if gradient.dtype != expected.dtype:
        gradient = gradient.to(expected.dtype)
    if number not in held:
        held[number] = gradient
        return
    # Not in place: nor does the engine where a dispatch mode is active, which is how memory is counted.
    held[number] = held[number] + gradient


def _apply(node: Node, held: dict[int, Tensor]) -> list[Tensor | None]:
    """The gradients of what the node was computed from; none where no gradient has reached it. Empties `held`."""
    gradients = [held.pop(number, None) for number in range(len(node._input_metadata))]
    if all(gradient is None for gradient in gradients):
        return []
    if not hasattr(type(node), "_forward_cls"):
        results = node(*gradients)
        return list(results) if isinstance(results, tuple) else [results]
    # A `torch.autograd.Function` gets zeros where nothing has arrived, which is the default of `set_materialize_grads`.
    for number, (gradient, expected) in enumerate(zip(gradients, node._input_metadata, strict=True)):
        if gradient is None:
            gradients[number] = torch.zeros(expected.shape, dtype=expected.dtype, device=expected.device)
    results = node.apply(*gradients)
    results = results if isinstance(results, tuple) else (results,)
    # It gives a gradient for each argument of `forward`; the graph has only the tensors among them.
    return [result for result, is_tensor in zip(results, node.simulated_tensors, strict=False) if is_tensor]


def _into_leaf(variable: Tensor, held: dict[int, Tensor]) -> None:
    gradient = held.pop(0)
    if variable.grad is not None:
        variable.grad.add_(gradient)
    elif sys.getrefcount(gradient) == 2 and _uses(gradient) == 1 and _has_layout_of(gradient, variable):
        variable.grad = gradient.detach()
    elif _is_dense(variable):
        variable.grad = torch.empty_strided(
            variable.shape, variable.stride(), dtype=gradient.dtype, device=gradient.device
        ).copy_(gradient)
    else:
        variable.grad = gradient.clone(memory_format=torch.contiguous_format)


def _uses(tensor: Tensor) -> int:
    """How often C++ holds the tensor; all of Python together counts once."""
    count: int = attribute(tensor, "_use_count")()
    return count


def _is_dense(tensor: Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _has_layout_of(gradient: Tensor, variable: Tensor) -> bool:
    """Whether a gradient may become the leaf's `grad` as it is."""
    if not _is_dense(variable):
        return gradient.is_contiguous()
    return all(
        size == 1 or mine == theirs
        for size, mine, theirs in zip(variable.shape, gradient.stride(), variable.stride(), strict=True)
    )


@contextmanager
def python_engine() -> Iterator[None]:
    """Within the context `backward()` and `torch.autograd.grad` walk the graph in Python, for graphs that are made in it."""
    walk = _Walk()
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        output = original.__get__(None, cls)(*args, **kwargs)
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and hasattr(type(tensor.grad_fn), "_forward_cls"):
                tensor.grad_fn.simulated_tensors = [isinstance(arg, Tensor) for arg in args]  # type: ignore[union-attr]
        return output

    with (
        patched(torch.autograd, "_engine_run_backward", walk.run),
        patched(torch.autograd.graph, "_engine_run_backward", walk.run),
        patched(torch.autograd.Function, "apply", classmethod(apply)),
        saved_tensors_hooks(_Saved, walk.unpack),
    ):
        yield
