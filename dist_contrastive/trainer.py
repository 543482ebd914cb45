"""One update of a run, and the state that it moves: method, optimizer, loss scaler, position."""

import dataclasses
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dist_contrastive import distributed, liveness, rng, signals
from dist_contrastive.batch import Batch, balanced_slices
from dist_contrastive.checkpoint import Checkpoint, CheckpointStore, Saver, load_module
from dist_contrastive.config import TrainConfig, UserError, require, to_dict
from dist_contrastive.data.augment import Augment
from dist_contrastive.methods import Method, method_of
from dist_contrastive.methods.base import MethodSettings
from dist_contrastive.models.base import Encoder
from dist_contrastive.models.encoders import build_encoder
from dist_contrastive.optim import build_optimizer, learning_rate, peak_learning_rate, set_rates, weight_decay
from dist_contrastive.preflight import device_and_precision, zero_launch
from dist_contrastive.schedules import Clock
from dist_contrastive.step.gradient import StepGradient, split
from dist_contrastive.step.memory_plan import MemoryPlan, make_plan
from dist_contrastive.step.replicas import DataParallel, OptimizerState, Replicas
from dist_contrastive.step.zero import ShardedOptimizer

# A loss scaler that had to go below this no longer helps: the gradients themselves are not finite.
SMALLEST_LOSS_SCALE = 1.0


VIEW_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""In what a GPU makes views: an encoder's first layer would convert them to it. A CPU has them in float32."""


class NonFiniteError(UserError):
    """Loss or gradient left the finite numbers; nothing was updated on any rank."""


@dataclass(frozen=True)
class StepReport:
    """What a step tells of itself."""

    step: int
    """Its number, from 1."""
    values: dict[str, float]
    """Means over the global batch, the learning rate, the norm of the gradient."""


@dataclass(frozen=True)
class _Numbers:
    """What a step tells, on its way to the host."""

    step: int
    names: list[str]
    rate: float
    scales: bool
    """Whether losses are scaled."""
    numbers: Tensor
    """On the host: `names`, whose loss is not finite, the gradient's norm and the losses' scale."""
    arrived: torch.cuda.Event | None
    """None where the host has them already."""

    def read(self) -> list[float]:
        """Waits until they are there."""
        if self.arrived:
            self.arrived.synchronize()
        found: list[float] = self.numbers.tolist()
        return found


def build_method(config: TrainConfig) -> Method:
    """The method with its initial weights, a pure function of the config: calling it again gives the untrained encoder."""
    cls = method_of(config)
    torch.manual_seed(rng.step_seed(config.seed, 0, 0))
    encoder = build_encoder(config.encoder, config.data.image_size)
    return cls(MethodSettings(config.method, encoder, config.seed, config.batch.size))


class Trainer:
    """What an update moves and a checkpoint holds.

    Attributes:
        step: how many updates are done, as everywhere: "step 5" is the state after five of them, or in messages the fifth
            update itself. The cursor is `step` times the global batch.
        method: the bare module; `replicas` has what wraps it for training.
        stopping: whether the ranks have agreed to stop (a signal reached one of them).
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        *,
        steps_per_epoch: int,
        dataset_sha256: str,
        fewest: int = 1,
    ) -> None:
        """`fewest`: samples that a forward pass of this rank needs at least (`preflight.check_passes`)."""
        self.config = config
        self.accelerator = accelerator
        self.device = accelerator.device
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * config.epochs
        self.peak_learning_rate = peak_learning_rate(config.optim, config.batch.size)
        self.step = 0
        self.stopping = False
        self._interrupted = False
        self._began_at = time.monotonic()
        self._seconds = 0.0
        self._under_way: _Numbers | None = None
        """Those of the last update, where the host has not seen them."""
        self._dataset_sha256 = dataset_sha256
        self.method = build_method(config)
        self.num_parameters = sum(p.numel() for p in self.method.parameters())
        zero = zero_launch(config)
        optimizer = build_optimizer(config.optim, self.method, self.method.late_parameters, fused=not zero)
        _, self.precision = device_and_precision(config.launch)
        self.replicas: Replicas
        if zero:
            self.replicas = ShardedOptimizer(self.method, optimizer, accelerator, self.precision)
        else:
            self.replicas = DataParallel(self.method, optimizer, accelerator)
        if config.launch.compile:
            for module in self.method.modules():
                if isinstance(module, Encoder):
                    module.compile_training()
        self.gradient = StepGradient(
            self.replicas,
            Augment(config.augment, VIEW_DTYPES[self.precision] if self.device.type == "cuda" else torch.float32),
            seed=config.seed,
            micro=0 if config.batch.micro == "auto" else config.batch.micro,
            fewest=fewest,
        )
        self.store = CheckpointStore(config.run_dir / "checkpoints", config.checkpoint.keep)
        self.saver = Saver(self.store, self.goes_on)

    @property
    def epoch(self) -> int:
        """The epoch of the next update, from 0."""
        return self.step // self.steps_per_epoch

    @property
    def resume_hint(self) -> str:
        """The command that continues this run, in words."""
        return "the same command without --overwrite" if self.config.overwrite else "the same command"

    def goes_on(self) -> str:
        """What that command does if the run stops here, without another checkpoint than the one under way."""
        self.saver.wait()
        kept = self.store.steps()
        return f"{self.resume_hint} {f'goes on from step {kept[-1]}' if kept else 'starts over'}"

    def interrupt(self) -> None:
        """Let all ranks stop after the next update, as a signal does."""
        self._interrupted = True

    @property
    def clock(self) -> Clock:
        """Where the run is; equal on all ranks."""
        return Clock(self.step, self.steps_per_epoch, self.total_steps, self._seconds)

    @property
    def step_in_epoch(self) -> int:
        return self.step % self.steps_per_epoch

    def is_logged(self, step: int) -> bool:
        """Whether the metrics that cost are taken once `step` updates are done."""
        return step % self.config.log_every == 0 or step in (1, self.total_steps)

    def update(self, batch: Batch) -> list[StepReport]:
        """One update by this rank's share of the global batch, as the loader gave it; returns the reports that are there by now.

        The host does not wait for the device, whose numbers it reads a step later, when the device has the next step to do; or
        now, where this step is logged. So the device alone leaves the update out where loss or gradient of any rank is not
        finite, and `NonFiniteError`, which names that step, is raised on all ranks when it is read, before another update.
        """
        liveness.at_step(self.step + 1)
        rate = self._set_learning_rate()
        is_logged = self.is_logged(self.step + 1)
        outcome = self.gradient.compute(batch, self.clock, logged=is_logged)
        grad_norm = self.replicas.norm_and_clip(self.config.optim.clip_norm)
        numbers, is_good = self._agree({**outcome.losses, **outcome.report}, grad_norm, rate)
        reports = self.settle()
        self._under_way = numbers
        if is_logged or not self.replicas.decides_on_device:
            reports += self.settle()
        self.gradient.attempt_update(self.step, ~is_good)
        self.step += 1
        self.method.after_step(self.clock, outcome.embeddings, is_good)
        return reports

    def settle(self) -> list[StepReport]:
        """The report of the last update, if it is not given yet; waits for the device. `NonFiniteError` as in `update`."""
        if self._under_way is None:
            return []
        sent, self._under_way = self._under_way, None
        *numbers, norm, scale = sent.read()
        bad_ranks = [rank for rank, is_bad in enumerate(numbers[len(sent.names) :]) if is_bad > 0]
        if bad_ranks:
            raise NonFiniteError(self._diverged(sent.step, f"the loss is not finite on rank(s) {bad_ranks}"))
        # Under fp16 an overflow is routine as long as the scaler can still go lower: it skips the update by itself.
        if not math.isfinite(norm) and not (sent.scales and scale >= SMALLEST_LOSS_SCALE):
            raise NonFiniteError(self._diverged(sent.step, "the gradient is not finite"))
        values = dict(zip(sent.names, numbers, strict=False))
        return [StepReport(sent.step, {**values, "grad_norm": norm, "learning_rate": sent.rate})]

    def plan_memory(self) -> MemoryPlan:
        """Find the micro-batch for this machine, and use it from now on; all ranks call it together."""
        plan = make_plan(self.gradient, self.config)
        self.gradient.micro = plan.micro
        return plan

    def learning_rate(self, step: int) -> float:
        """Of the update that follows `step` others."""
        return learning_rate(self.config, self.steps_per_epoch, step)

    def planned_schedules(self, epochs: int | None = None) -> dict[str, list[float]]:
        """What each update of the whole run is to use, the first to the last: `learning_rate`, and where there is a teacher
        `teacher_momentum`, where it changes `weight_decay`; if the run had so many epochs."""
        config = dataclasses.replace(self.config, epochs=epochs or self.config.epochs)
        total_steps = config.epochs * self.steps_per_epoch
        steps = range(1, total_steps + 1)
        momenta = [self.method.teacher_momentum(step / total_steps) for step in steps]
        decays = [weight_decay(config.optim, (step - 1) / total_steps) for step in steps]
        return {
            "learning_rate": [learning_rate(config, self.steps_per_epoch, step - 1) for step in steps],
            **({"weight_decay": decays} if config.optim.weight_decay_end is not None else {}),
            **({"teacher_momentum": known} if (known := [m for m in momenta if m is not None]) else {}),
        }

    def _set_learning_rate(self) -> float:
        rate = self.learning_rate(self.step)
        set_rates(self.replicas.optimizer, self.config.optim, rate, self.clock)
        return rate

    def _agree(self, values: dict[str, Tensor], grad_norm: Tensor, rate: float) -> tuple[_Numbers, Tensor]:
        """The means of `values` over ranks, under way to the host, and on the device alone whether the step is good (bool []).

        What one host knows (a signal to stop, the time), all know after this.
        """
        names = list(values)
        ranks, me = distributed.world_size(), distributed.rank()
        message = torch.zeros(len(names) + ranks, device=self.device)
        message[: len(names)] = torch.stack([values[name].detach().float() for name in names]) / ranks
        message[len(names) + me] = (~torch.isfinite(values["loss"].detach())).float()
        total = distributed.all_reduce_sum(message)
        # The hosts agree while their devices are still at work.
        stop = self._interrupted or signals.requested() or self.saver.has_failed
        stops, milliseconds = distributed.gather_numbers(int(stop), round(1e3 * (time.monotonic() - self._began_at)))
        self.stopping, self._seconds = any(stops), milliseconds[0] / 1e3
        loss_scale = self.replicas.loss_scale
        scale = torch.zeros_like(grad_norm) if loss_scale is None else torch.zeros_like(grad_norm) + loss_scale
        is_good = ~total[len(names) :].any() & (grad_norm.isfinite() | (scale >= SMALLEST_LOSS_SCALE))
        # One transfer to the host for everything the step reports.
        numbers = torch.cat([total, grad_norm.float()[None], scale.float()[None]]).to("cpu", non_blocking=True)
        arrived = None
        if self.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        return _Numbers(self.step + 1, names, rate, loss_scale is not None, numbers, arrived), is_good

    def _diverged(self, step: int, what: str) -> str:
        """The line about it; all ranks call it."""
        with suppress(UserError):
            self.saver.settle()
        steps = self.store.steps()
        last = f"the last good checkpoint is {self.store.path(steps[-1])}" if steps else "there is no checkpoint yet"
        return (
            f"step {step}: {what}; nothing was updated; {last}; "
            "lower --optim.learning-rate, clip with --optim.clip-norm or use --launch.precision fp32"
        )

    def save(self, extra: dict[str, Any]) -> None:
        """Begin a checkpoint with `extra` (JSON values) beside the state; all ranks call it, and go on while it is written.

        `UserError` on all ranks where it can't be written is raised here, by the next `save` or by `saver.settle`; until then
        `stopping` is true after the next update. The older checkpoints are untouched.
        """
        assert self._under_way is None, "nobody knows yet whether the last update was a good one: settle first"
        optimizer = self.replicas.state()
        state = {
            "step": self.step,
            "cursor": self.step * self.config.batch.size,
            "config": to_dict(self.config),
            "dataset_sha256": self._dataset_sha256,
            "precision": self.precision,
            "ranks": distributed.world_size(),
            "micro": self.gradient.micro,
            "optimizer": optimizer.rest,
            "scaler": optimizer.scaler,
            "gradient_places": optimizer.places,
            "extra": extra,
        }
        self.saver.save(self.step, state, {"model": self.method.state_dict(), "optimizer": optimizer.tensors})

    def restore(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Take over a checkpoint's state; returns its `extra`. All ranks call it with the same checkpoint.

        `UserError`, and nothing is taken over, where its steps are not those that this run would have done.
        """
        state = checkpoint.state
        self._check_course(state["config"]["epochs"], state["step"])
        require(
            state["dataset_sha256"] == self._dataset_sha256,
            f"{checkpoint.path} was trained on another dataset than {self.config.data.path}; give the same file",
        )
        require(
            state["precision"] == self.precision,
            f"the run was started in {state['precision']}, not {self.precision}; pass --launch.precision {state['precision']}",
        )
        load_module(self.method, checkpoint.tensors["model"])
        self.replicas.adopt_parameters()
        # Written by older versions without places.
        places = state.get("gradient_places", [])
        self.replicas.load(OptimizerState(checkpoint.tensors["optimizer"], state["optimizer"], state["scaler"], places))
        # A micro-batch that was found or forced stays what it was, for BatchNorm's sake, where it was for the same share.
        if state["ranks"] == distributed.world_size() and state["config"]["batch"] == to_dict(self.config)["batch"]:
            self.gradient.micro = state["micro"]
        self.step = state["step"]
        extra: dict[str, Any] = state["extra"]
        return extra

    def _check_course(self, epochs: int, step: int) -> None:
        """`UserError` unless `step` steps of a run of so many epochs are the first ones of this run, bit for bit."""
        if epochs == self.config.epochs:
            return
        before, now = self.planned_schedules(epochs), self.planned_schedules()
        changed = [name.replace("_", " ") for name in now if before[name][:step] != now[name][:step]]
        reason = f"the {' and the '.join(changed)} of steps that are done would be another" if changed else ""
        if step > self.total_steps:
            reason = f"an epoch has {self.steps_per_epoch} steps"
        require(
            not reason,
            f"{self.config.run_dir} has done {step} steps of a run of {epochs} epochs, which can't become one of "
            f"{self.config.epochs}: {reason}; start over with --overwrite, or start a new run from its weights with --from "
            f"{self.config.run_dir} --run-dir ANOTHER",
        )

    def normalization_change(self, ranks: int, micro: int) -> str:
        """A line that says so where BatchNorm puts other samples together than on `ranks` ranks in micro-batches of `micro`;
        empty where it does not, or where there is none."""

        def groups(ranks: int, micro: int) -> set[tuple[int, ...]]:
            """The samples of a global batch that share their statistics."""
            rank_batch = self.config.batch.size // ranks
            passes = [
                range(part.start + cut.start, part.start + cut.stop)
                for part in split(rank_batch, micro)
                for cut in balanced_slices(part.stop - part.start, self.method.groups_of_norm(part.stop - part.start))
            ]
            of_ranks = [[tuple(rank * rank_batch + n for n in one) for one in passes] for rank in range(ranks)]
            if self.config.encoder.norm == "sync":
                return {sum(together, ()) for together in zip(*of_ranks, strict=True)}
            return {one for of_rank in of_ranks for one in of_rank}

        now_ranks, now_micro = distributed.world_size(), self.gradient.micro
        if self.config.encoder.norm == "group" or groups(ranks, micro) == groups(now_ranks, now_micro):
            return ""
        before, now = (
            f"{number} rank(s), {f'micro-batches of {size}' if size else 'without micro-batches'}"
            for number, size in ((ranks, micro), (now_ranks, now_micro))
        )
        return (
            f"warning: BatchNorm now sees other groups of samples ({now}) than before ({before}), so the losses are no longer "
            "those of the run as it was started; --encoder.norm group, or sync without micro-batches, does not depend on it"
        )
