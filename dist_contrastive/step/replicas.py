"""One copy of a method on each rank, and what keeps the copies equal: the average of gradients, and the update."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from dist_contrastive import distributed
from dist_contrastive.batch import Batch
from dist_contrastive.checkpoint import Tensors, load_optimizer, optimizer_tensors
from dist_contrastive.methods.base import Embeddings, Method
from dist_contrastive.optim import make_momentum, step_unless
from dist_contrastive.step.buckets import Buckets

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
    places: list[int]
    """In which order gradients are averaged (`Buckets.places`); empty where that is not known."""


class Replicas(ABC):
    """What stands between a step and the ranks' copies of its method.

    A step computes each rank's own gradient within `collecting`, its last backward pass within `averaging`; at the end all
    ranks have the average. Then come `norm_and_clip` and `update`. All ranks call each of these together, and every optimizer
    state is kept in the parameters' own shapes, whatever an implementation makes of it in memory: a run may go on under another
    one, and at another number of ranks.

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
        """Within the context backward passes add to this rank's own gradient, which is averaged over ranks by its end.

        A context that is left by an exception averages nothing, so either all ranks leave it so or none. After
        `discard` there is nothing to average.
        """

    @abstractmethod
    def averaging(self) -> AbstractContextManager[None]:
        """Within the context, once in `collecting`, runs the backward pass that completes the gradient.

        Averaging may begin before that pass ends: where a rank has failed in it, all have to `catch_up`.
        """

    def catch_up(self) -> list[dist.Work]:
        """Start what this rank has not yet started of the step's averages; all that is under way. The gradient is lost."""
        return []

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
    def update(self, left_out: Tensor) -> None:
        """Let the optimizer move the parameters by the gradient, and forget that. Under fp16 an overflow skips the update.

        Nothing is moved where `left_out` (bool [], equal on all ranks) is true; only where `decides_on_device`, or else it is
        for the caller to heed.
        """

    @property
    @abstractmethod
    def decides_on_device(self) -> bool:
        """Whether the host need not know if an update is to be done."""

    @property
    @abstractmethod
    def loss_scale(self) -> Tensor | float | None:
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

    def forward(self, batch: Batch, what: Passed) -> Embeddings:
        """A batch's embeddings, its targets, or both."""
        method = self.method
        passes = {"embeddings": method.embed, "targets": method.targets, "both": method.embed_all}
        return passes[what](batch)


class DataParallel(Replicas):
    """Whole copies, whose gradients are averaged in buckets; at one rank there is nothing to average."""

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
        self.method = method
        self.optimizer = optimizer
        self.device = accelerator.device
        self._accelerator = accelerator
        self._scaler: torch.amp.GradScaler | None = accelerator.scaler
        # Accelerate moves it to its device and casts its passes; DistributedDataParallel, in which it would wrap it for training,
        # can't do what `Buckets` do.
        self._module = accelerator.prepare_model(Embedder(method), evaluation_mode=True)
        self._module.train()
        self._buckets: Buckets | None = None
        if distributed.world_size() > 1:
            # Buffers need no broadcast at each step. Unsynchronised BatchNorm statistics differ between ranks, but training never
            # reads them, and probes and checkpoints take rank 0's; other buffers (a queue) are equal on all ranks by themselves.
            distributed.broadcast_parameters(method)
            self._buckets = Buckets([p for p in method.parameters() if p.requires_grad])

    def forward(self, batch: Batch, what: Passed) -> Embeddings:
        embeddings: Embeddings = self._module(batch, what)
        return embeddings

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        if self._buckets:
            self._buckets.begin()
        yield

    def averaging(self) -> AbstractContextManager[None]:
        return self._buckets.averaging() if self._buckets else nullcontext()

    def catch_up(self) -> list[dist.Work]:
        return self._buckets.catch_up() if self._buckets else []

    def discard(self) -> None:
        if self._buckets:
            self._buckets.forget()
        self.method.zero_grad(set_to_none=True)

    def norm_and_clip(self, largest: float) -> Tensor:
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        parameters = [p for p in self.method.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if largest:
            torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        return norm

    def make_room(self) -> None:
        make_momentum(self.optimizer)

    def update(self, left_out: Tensor) -> None:
        if self._scaler is None:
            step_unless(self.optimizer, left_out)
        else:
            # An overflow that it has found itself it takes for routine, and lowers the scale.
            for found in self._scaler._found_inf_per_device(self.optimizer).values():
                found.copy_(torch.maximum(found, left_out.float()))
            make_momentum(self.optimizer)
            self._scaler.step(self.optimizer)
            self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def decides_on_device(self) -> bool:
        return True

    @property
    def loss_scale(self) -> Tensor | None:
        return None if self._scaler is None else self._scaler._get_scale_async()

    @property
    def has_state(self) -> bool:
        return bool(self.optimizer.state)

    def adopt_parameters(self) -> None:
        pass

    def state(self) -> OptimizerState:
        tensors, rest = optimizer_tensors(self.optimizer)
        return OptimizerState(
            tensors if distributed.is_main() else {},
            rest,
            None if self._scaler is None else self._scaler.state_dict(),
            self._buckets.places if self._buckets else [],
        )

    def load(self, state: OptimizerState) -> None:
        load_optimizer(self.optimizer, state.tensors, state.rest)
        if self._scaler is not None:
            self._scaler.load_state_dict(state.scaler or {})
        if self._buckets and state.places:
            self._buckets.take(state.places)
