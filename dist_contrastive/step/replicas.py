"""One copy of a method on each rank, and what keeps the copies equal: the average of gradients, and the update."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dist_contrastive import distributed
from dist_contrastive.batch import Batch
from dist_contrastive.checkpoint import Tensors, load_optimizer, optimizer_tensors
from dist_contrastive.methods.base import Embeddings, Method

Passed = Literal["embeddings", "targets", "both"]
"""What a forward pass is asked for: what gradient flows through, what it does not, or both."""


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer and its loss scaler keep between updates, in words that no implementation has to itself."""

    tensors: Tensors
    """`<parameter number>.<key>`, each of its parameter's shape or a scalar; on rank 0, and empty on the others."""
    rest: list[dict[str, Any]]
    """JSON values, a dict for each parameter: its state that is no tensor."""
    scaler: dict[str, Any] | None
    """The loss scaler's; None where losses are not scaled."""


class Replicas(ABC):
    """What stands between a step and the ranks' copies of its method.

    A step computes each rank's own gradient within `collecting`, at whose end all ranks have the average; then come
    `norm_and_clip` and `update`. All ranks call each of these together, and every optimizer state is kept in the
    parameters' own shapes, whatever an implementation makes of it in memory: a run may go on under another one, and at
    another number of ranks.

    Attributes:
        method: the bare module.
        optimizer: as it was built over the method's parameters; learning rates are set in its `param_groups`.
        device: what this rank computes on.
    """

    method: Method
    optimizer: torch.optim.Optimizer
    device: torch.device

    @abstractmethod
    def forward(self, batch: Batch, what: Passed) -> Embeddings:
        """A batch's embeddings, its targets, or both, in the precision that was launched."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Back-propagate a scalar, scaled where the precision wants it.

        What it leaves at leaves is scaled, too, and flows on through `torch.autograd.backward` as it is.
        """

    @abstractmethod
    def collecting(self) -> AbstractContextManager[None]:
        """Within the context backward passes add to this rank's own gradient; its end averages it over ranks.

        A context that is left by an exception averages nothing, so either all ranks leave it so or none. After
        `discard` there is nothing to average.
        """

    @abstractmethod
    def discard(self) -> None:
        """Forget the gradient that was collected so far, on this rank."""

    @abstractmethod
    def norm_and_clip(self, largest: float) -> Tensor:
        """The L2 norm of the whole averaged gradient, a scalar that is equal on all ranks; then clip it to `largest` (0: don't).

        Not finite where any number of the gradient is not.
        """

    def make_room(self) -> None:  # noqa: B027 - most have nothing to do
        """Take the memory that the first update takes, and give it back.

        For an update in which ranks wait for one another: a rank without memory must be found before it.
        """

    @abstractmethod
    def update(self) -> None:
        """Let the optimizer move the parameters by the gradient, and forget that. Under fp16 an overflow skips the update."""

    @property
    @abstractmethod
    def loss_scale(self) -> float | None:
        """By what losses are multiplied now; None where they are not."""

    @property
    @abstractmethod
    def has_state(self) -> bool:
        """Whether the optimizer has made the state that its first update needs."""

    @abstractmethod
    def adopt_parameters(self) -> None:
        """Go on from the method's parameters as they are now: something else than an update has set them, alike on all ranks."""

    @abstractmethod
    def state(self) -> OptimizerState:
        """A copy or a view of the state, to be written before the next update."""

    @abstractmethod
    def load(self, state: OptimizerState) -> None:
        """Take over a state, which every rank has been given in full."""


class Embedder(nn.Module):
    """What is wrapped for training: the half of a method that has parameters."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Batch | None, what: Passed = "both") -> Embeddings:
        """A batch's embeddings, its targets, or both; without a batch, a zero that depends on each trained parameter."""
        if batch is not None:
            method = self.method
            passes = {"embeddings": method.embed, "targets": method.targets, "both": method.embed_all}
            return passes[what](batch)
        zeros = [p.sum() * 0 for p in self.method.parameters() if p.requires_grad]
        return {"zero": torch.stack(zeros).sum()}


class DataParallel(Replicas):
    """Whole copies under torch's DistributedDataParallel; at one rank, the bare method."""

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
        self.method = method
        self.optimizer = optimizer
        self.device = accelerator.device
        self._accelerator = accelerator
        self._ddp = accelerator.prepare(Embedder(method))
        # Buffers need no broadcast at each step. Unsynchronised BatchNorm statistics differ between ranks, but training never
        # reads them, and probes and checkpoints take rank 0's; other buffers (a queue) are equal on all ranks by themselves.
        self._ddp.broadcast_buffers = False
        # After its first pass DDP orders its buckets anew, with a broadcast in the next forward pass. That would come in the
        # second step, within an attempt, where a rank that is out of memory does not answer it: it comes here.
        for _ in range(2):
            self._average()
        method.zero_grad(set_to_none=True)
        self._prepared = accelerator.prepare(optimizer)
        self._ddp.train()

    def forward(self, batch: Batch, what: Passed) -> Embeddings:
        embeddings: Embeddings = self._ddp(batch, what)
        return embeddings

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        self._collected = True
        with self._accelerator.no_sync(self._ddp):
            yield
        if self._collected:
            self._average()

    def discard(self) -> None:
        self._collected = False
        self.method.zero_grad(set_to_none=True)

    def _average(self) -> None:
        """DDP's only communication in a step.

        DDP averages in a backward pass that it has prepared; this one adds nothing to the gradients that are there.
        """
        if distributed.world_size() > 1:
            distributed.arrive()
            self._ddp(None)["zero"].backward()

    def norm_and_clip(self, largest: float) -> Tensor:
        self._accelerator.unscale_gradients()
        parameters = [p for p in self.method.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if largest:
            torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        return norm

    def update(self) -> None:
        self._prepared.step()
        self._prepared.zero_grad()

    @property
    def loss_scale(self) -> float | None:
        scaler = self._accelerator.scaler
        return None if scaler is None else float(scaler.get_scale())

    @property
    def has_state(self) -> bool:
        return bool(self.optimizer.state)

    def adopt_parameters(self) -> None:
        pass

    def state(self) -> OptimizerState:
        tensors, rest = optimizer_tensors(self.optimizer)
        scaler = self._accelerator.scaler
        return OptimizerState(
            tensors if distributed.is_main() else {}, rest, None if scaler is None else scaler.state_dict()
        )

    def load(self, state: OptimizerState) -> None:
        load_optimizer(self.optimizer, state.tensors, state.rest)
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state.scaler or {})
