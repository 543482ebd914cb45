"""ZeRO stages 1 and 2 through DeepSpeed: each rank keeps a share of the optimizer's state (Rajbhandari et al. 2020).

Passes, gradient caching and the protocol for a rank that runs out of memory are those of whole copies: DeepSpeed's
`coalesce_grad_reduction` leaves gradients where backward passes put them until a step has all of them. Parameters stay in
fp32, and passes run under torch's autocast, as those of whole copies, so that both compute the same.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dist_contrastive import distributed
from dist_contrastive.batch import Batch
from dist_contrastive.methods.base import Embeddings, Method
from dist_contrastive.step.replicas import Embedder, OptimizerState, Passed, Replicas

GROWTH, BACKOFF, GROWTH_INTERVAL, FIRST_SCALE = 2.0, 0.5, 2000, 65536.0
"""Of the loss scale, as torch.amp.GradScaler has them."""
STATES = 2
"""Tensors of its parameters' size that an optimizer keeps, at most."""
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ShardedOptimizer(Replicas):
    """Whole copies of the parameters, shares of the optimizer's state."""

    def __init__(
        self, method: Method, optimizer: torch.optim.Optimizer, accelerator: Accelerator, precision: str
    ) -> None:
        """`precision`: fp32, bf16 or fp16."""
        self.method = method
        self.optimizer = optimizer
        self.device = accelerator.device
        self._autocast = AUTOCAST.get(precision)
        self._scale = FIRST_SCALE if precision == "fp16" else 1.0
        self._good_updates = 0
        # In the order of a checkpoint's numbers: DeepSpeed puts flat shares in their place in the optimizer's groups.
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._groups = [len(group["params"]) for group in optimizer.param_groups]
        # Flat shares have no channels-last layout, which DeepSpeed can't broadcast either.
        for parameter in method.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self._engine, _ = accelerator.prepare(Embedder(method), optimizer)
        self._zero = self._engine.optimizer
        self._zero.override_loss_scale(self._scale)

    def forward(self, batch: Batch, what: Passed) -> Embeddings:
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            # The engine's own forward pass would cast, and wait for gradients, in ways of its own.
            embeddings: Embeddings = self._engine.module(batch, what)
        return {name: value.float() if value.is_floating_point() else value for name, value in embeddings.items()}

    def backward(self, loss: Tensor) -> None:
        (loss * self._scale).backward()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        with self._engine.coalesce_grad_reduction():
            yield
            distributed.arrive()

    def averaging(self) -> AbstractContextManager[None]:
        return nullcontext()  # it averages when `collecting` ends

    def discard(self) -> None:
        self._zero.zero_grad()

    def norm_and_clip(self, largest: float) -> Tensor:
        distributed.arrive()
        # What is not finite is infinity in DeepSpeed's norm. It clips where it updates, by the same norm.
        norm: Tensor = self._zero.scaled_global_norm() / self._scale
        self._zero.clip_grad = largest
        return norm

    def make_room(self) -> None:
        # Its state, its share of the gradient as one flat tensor, and as much for intermediate results.
        held = [torch.empty_like(share) for share, _, _ in self._shares() for _ in range(STATES + 2)]
        held.clear()

    def update(self, left_out: Tensor) -> None:
        distributed.arrive()
        self._engine.step()
        if self._autocast is torch.float16:
            self._adapt_scale(overflow=not self._engine.was_step_applied())

    def _adapt_scale(self, *, overflow: bool) -> None:
        self._good_updates = 0 if overflow else self._good_updates + 1
        if overflow:
            self._scale *= BACKOFF
        elif self._good_updates == GROWTH_INTERVAL:
            self._scale *= GROWTH
            self._good_updates = 0
        self._zero.override_loss_scale(self._scale)

    @property
    def decides_on_device(self) -> bool:
        return False  # DeepSpeed asks the device whether any gradient is infinite

    @property
    def loss_scale(self) -> float | None:
        return self._scale if self._autocast is torch.float16 else None

    @property
    def has_state(self) -> bool:
        return bool(self.optimizer.state)

    def adopt_parameters(self) -> None:
        self._zero.refresh_fp32_params()

    def state(self) -> OptimizerState:
        tensors: dict[str, Tensor] = {}
        rest: list[dict[str, Any]] = []
        for share, parameters, first in self._shares():
            kept = self.optimizer.state.get(share, {})
            # Sorted, as all ranks gather in the same order.
            sharded = sorted(name for name, value in kept.items() if _is_sharded(value, share))
            for number, parameter in enumerate(parameters, first):
                for name in sharded:
                    whole = self._gather(parameter, kept[name])
                    if distributed.is_main():
                        tensors[f"{number}.{name}"] = whole.cpu()
                if distributed.is_main():
                    tensors.update(
                        {
                            f"{number}.{k}": v.clone()
                            for k, v in kept.items()
                            if isinstance(v, Tensor) and k not in sharded
                        }
                    )
                rest.append({k: v for k, v in kept.items() if not isinstance(v, Tensor)})
        scaler = None
        if self._autocast is torch.float16:
            scaler = {
                "scale": self._scale,
                "growth_factor": GROWTH,
                "backoff_factor": BACKOFF,
                "growth_interval": GROWTH_INTERVAL,
                "_growth_tracker": self._good_updates,
            }
        return OptimizerState(tensors, rest, scaler, places=[])

    def load(self, state: OptimizerState) -> None:
        for share, parameters, first in self._shares():
            restored: dict[str, Any] = dict(state.rest[first])
            of_first = {n.partition(".")[2]: t for n, t in state.tensors.items() if n.partition(".")[0] == str(first)}
            for name, example in of_first.items():
                # AdamW's counter of steps is a scalar even where a parameter is one as well.
                if name == "step" or example.shape != parameters[0].shape:
                    restored[name] = example.clone()
                    continue
                restored[name] = torch.zeros_like(share)
                for number, parameter in enumerate(parameters, first):
                    whole = state.tensors[f"{number}.{name}"].to(share.device)
                    for own, of_parameter in _overlap(parameter):
                        restored[name][own] = whole.flatten()[of_parameter]
            if restored:
                self.optimizer.state[share] = restored
        if state.scaler is not None:
            self._scale, self._good_updates = float(state.scaler["scale"]), int(state.scaler["_growth_tracker"])
            self._zero.override_loss_scale(self._scale)

    def _shares(self) -> Iterator[tuple[Tensor, list[Tensor], int]]:
        """For each of the optimizer's groups: this rank's flat share of it, the group's parameters, the first one's number."""
        first = 0
        for share, size in zip(self._zero.single_partition_of_fp32_groups, self._groups, strict=True):
            yield share, self._parameters[first : first + size], first
            first += size

    def _gather(self, parameter: Tensor, kept: Tensor) -> Tensor:
        """One parameter's part of a state whose share this rank keeps, on every rank, of the parameter's shape."""
        whole = torch.zeros(parameter.numel(), dtype=kept.dtype, device=self.device)
        for own, of_parameter in _overlap(parameter):
            whole[of_parameter] = kept[own].to(self.device)
        return distributed.all_reduce_sum(whole).view(parameter.shape)


def _is_sharded(value: Any, share: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == share.shape


def _overlap(parameter: Tensor) -> Iterator[tuple[slice, slice]]:
    """Where this rank's flat share and a parameter, flattened, have numbers in common: at most one pair of slices."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is not None:
        ours, its = mapping.hp_fragment_address, mapping.lp_fragment_address
        yield slice(ours.start, ours.start + ours.numel), slice(its.start, its.start + its.numel)
