"""The gradient of one step over a global batch of any size, through micro-batches that the memory holds.

Where the loss couples samples, micro-batches take gradient caching (Gao et al. 2021, "Scaling deep contrastive learning
batch size under memory limited setup"): all embeddings first, without graph; the loss and its gradient at the embeddings of
all ranks, once; then micro-batch by micro-batch a second forward pass, through which that gradient flows back. It is the
gradient of the whole batch, not an approximation. Where the loss is a mean over samples, gradients simply add up; if its targets
have to be settled over the whole batch first (`Method.settle`), those of all micro-batches are made before the first loss.

Both passes of a micro-batch see the same augmentation and dropout (functions of the sample) and the same draws of torch's
generator (seeded by step, rank and micro-batch); teachers take part in the first pass alone. BatchNorm normalizes a
micro-batch with the micro-batch's own statistics (synchronised: of all ranks' micro-batches of that number), in both passes,
so that the gradient is exact for the function that the passes compute; its running statistics take each sample once, and move
as far in a step as they do without micro-batches. With other normalizations micro-batches change nothing but rounding.

Nothing is updated before all ranks have their gradient, and gradients are averaged once, while the last backward pass goes on. So
where one rank runs out of memory, all halve the micro-batch and repeat the step.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dist_contrastive import distributed, rng
from dist_contrastive.batch import Batch, Samples, balanced_slices, smallest_part
from dist_contrastive.config import UserError
from dist_contrastive.methods.base import Embeddings, Losses, Report
from dist_contrastive.models.batch_statistics import (
    batch_norms,
    running_statistics,
    statistics_share,
    statistics_untouched,
)
from dist_contrastive.models.sync_norm import message_size
from dist_contrastive.models.teacher import Teacher
from dist_contrastive.out_of_memory import is_out_of_memory, quote
from dist_contrastive.schedules import Clock
from dist_contrastive.step.memory import release_memory
from dist_contrastive.step.replicas import Passed, Replicas

T = TypeVar("T")
Augmentation = Callable[[Batch, torch.device], Batch]
Around = Mapping[int, Callable[[], AbstractContextManager[None]]]

WHAT_NEEDS_LESS = "a smaller --batch.global, or a method whose negatives come from a queue (--method.queue), needs less"
"""What to do where no micro-batch fits."""
START = Clock(step=0, steps_per_epoch=1, total_steps=1)
"""Of a step that is only rehearsed."""


@dataclass(frozen=True)
class Outcome:
    """What a step gives beside the gradient; everything detached."""

    losses: Losses
    report: Report
    embeddings: Embeddings
    """Of the whole rank batch."""


class StepGradient:
    """Computes a step's gradient, averaged over ranks, into the parameters of a method.

    Attributes:
        fewest: samples that each forward pass has at least, whatever the memory.
        micro: samples of one forward pass of this rank at most; halved when any rank runs out of memory.
        say: what is called with a line of text when that happens.
    """

    def __init__(
        self, replicas: Replicas, augmentation: Augmentation, *, seed: int, micro: int, fewest: int = 1
    ) -> None:
        self.replicas = replicas
        self.method = replicas.method
        self.fewest = fewest
        self.micro = micro
        self.say: Callable[[str], None] = lambda text: None
        self._device = replicas.device
        self._augmentation = augmentation
        self._seed = seed
        self._message_size = message_size(self.method)
        self._norms = batch_norms(self.method)
        self._teachers_norms = [
            norm for m in self.method.modules() if isinstance(m, Teacher) for norm in batch_norms(m)
        ]
        self._students_norms = [norm for norm in self._norms if norm not in self._teachers_norms]
        self._quoted = ""
        """How memory ran out on this rank: the error's text, or nothing."""

    def compute(self, batch: Batch, clock: Clock, *, logged: bool = True) -> Outcome:
        """The gradient of the next update at `clock`, by this rank's share `batch`, as the loader gave it.

        Where the step is `logged`, its report has what costs, too.

        Raises `UserError` on all ranks where even the smallest micro-batch does not fit.
        """
        self.method.train()
        # Running statistics are the only state that a forward pass moves; an attempt that fails must leave none behind.
        statistics = [buffer.clone() for buffer in running_statistics(self._norms)]
        while True:
            with self.replicas.collecting():
                try:
                    return self._try(batch, clock, logged)
                except distributed.RanksFailed as failure:
                    failed = failure.ranks
                    self.replicas.discard()
            for buffer, before in zip(running_statistics(self._norms), statistics, strict=True):
                buffer.copy_(before)
            release_memory(self._device)
            self._halve(len(batch), clock.step, failed)

    def attempt_update(self, step: int, left_out: Tensor) -> None:
        """Let the optimizer update by the gradient, after `step` other updates; `left_out` as in `Replicas.update`.

        `UserError` on all ranks where memory runs out on any. What is updated half can't be repeated.
        """
        try:
            if not self.replicas.has_state:
                self._attempt(self.replicas.make_room)
            self._attempt(lambda: self.replicas.update(left_out))
        except distributed.RanksFailed as failure:
            raise UserError(
                f"step {step + 1}: out of memory on rank(s) {failure.ranks} in the optimizer's update ({self._gather_quote()}); "
                "what was saved is kept; give a smaller --batch.micro, which leaves more to the optimizer, or launch with "
                "launch_configs/deepspeed_zero1.yaml, which shares its state among the ranks"
            ) from failure

    def _gather_quote(self) -> str:
        """How memory ran out on the first rank where it did."""
        quoted: str = next(text for text in distributed.gather_objects(self._quoted) if text)
        self._quoted = ""
        return quoted

    def _halve(self, rank_batch: int, step: int, failed: list[int]) -> None:
        quoted = self._gather_quote()
        micro = min(self.micro or rank_batch, rank_batch)
        smaller = [m for m in range(1, micro) if smallest_part(rank_batch, m) >= self.fewest]
        if not smaller:
            at_a_time = "one sample" if micro == 1 else f"{micro} samples"
            raise UserError(
                f"step {step + 1}: out of memory on rank(s) {failed} even at {at_a_time} at a time ({quoted}); {WHAT_NEEDS_LESS}"
            )
        self.micro = max((m for m in smaller if m <= micro // 2), default=smaller[0])
        self.say(
            f"step {step + 1}: out of memory on rank(s) {failed} ({quoted}); repeated with micro-batches of {self.micro} "
            f"samples instead of {micro}"
        )

    def _try(self, batch: Batch, clock: Clock, logged: bool) -> Outcome:
        """This rank's gradient; `RanksFailed` on all ranks where any is out of memory."""
        parts = split(len(batch), self.micro)
        # What the loss reads goes to the device at once; views go one micro-batch at a time, with their augmentation.
        losses, embeddings = self._passes(batch, batch.samples.to(self._device), parts, clock)
        report = self._attempt(lambda: self.method.report(embeddings, logged=logged))
        return Outcome({name: loss.detach() for name, loss in losses.items()}, report, embeddings)

    def _attempt(self, call: Callable[[], T], *, averages: bool = False) -> T:
        """`averages`: whether the call has the backward pass that completes the gradient."""

        def is_expected(error: Exception) -> bool:
            expected = is_out_of_memory(error)
            self._quoted = quote(error) if expected else ""
            return expected

        catch_up = self.replicas.catch_up if averages else list
        return distributed.attempt(call, is_expected, self._device, message_size=self._message_size, catch_up=catch_up)

    def _embed(self, batch: Batch, parts: Sequence[slice], number: int, step: int, what: Passed) -> Embeddings:
        """Embeddings of micro-batch `number`, its targets, or both; the same ones each time it is called."""
        torch.manual_seed(rng.step_seed(self._seed, step, distributed.rank()) + number)
        samples = self._augmentation(batch.part(parts[number]), self._device)
        return self.replicas.forward(samples, what)

    def _passes(
        self, batch: Batch, samples: Samples, parts: Sequence[slice], clock: Clock, rehearsed: int | None = None
    ) -> tuple[Losses, Embeddings]:
        """The gradient of `batch`, cut into `parts`, whose `samples` are on the device; losses and embeddings.

        Only the first `rehearsed` parts are passed, where that is given, and stand for the others too.
        """
        passes = self._cached if self.method.couples_samples else self._accumulated
        if rehearsed is None:
            return passes(batch, samples, parts, clock, len(parts), {len(parts) - 1: self.replicas.averaging})
        return passes(batch, samples, parts, clock, rehearsed, {})

    def _cached(
        self, batch: Batch, samples: Samples, parts: Sequence[slice], clock: Clock, num_passes: int, around: Around
    ) -> tuple[Losses, Embeddings]:
        """Gradient caching. With a single micro-batch the first pass keeps its graph, and there is no second.

        `around`: by number, the context of a micro-batch's backward pass.
        """
        single = len(parts) == 1

        def first_pass() -> list[Embeddings]:
            embeddings = []
            for number in range(num_passes):
                with ExitStack() as stack:
                    if not single:
                        stack.enter_context(torch.no_grad())
                        stack.enter_context(statistics_untouched(self._students_norms))
                        stack.enter_context(statistics_share(self._teachers_norms, parts, number))
                    embeddings.append(self._embed(batch, parts, number, clock.step, "both"))
            return embeddings

        first = self._attempt(first_pass)
        embeddings = concatenate(first, parts)
        if not single:
            first.clear()
        leaves = {name: value.requires_grad_() for name, value in embeddings.items()}
        losses = self._attempt(lambda: self._loss_gradient(leaves, samples, clock))
        embeddings = {name: value.detach() for name, value in leaves.items()}
        gradients = {name: value.grad for name, value in leaves.items()}

        def second_pass() -> None:
            for number in range(num_passes):
                if single:
                    again = first[0]
                else:
                    with statistics_share(self._students_norms, parts, number):
                        again = self._embed(batch, parts, number, clock.step, "embeddings")
                part = parts[number]
                with around.get(number, nullcontext)():
                    backward(again, {name: None if g is None else g[:, part] for name, g in gradients.items()})

        self._attempt(second_pass, averages=bool(around))
        return losses, embeddings

    def _loss_gradient(self, leaves: Embeddings, samples: Samples, clock: Clock) -> Losses:
        with torch.no_grad():
            self.method.settle(leaves, clock)
        losses = self.method.loss(leaves, samples)
        self.replicas.backward(losses["loss"])
        return losses

    def _accumulated(
        self, batch: Batch, samples: Samples, parts: Sequence[slice], clock: Clock, num_passes: int, around: Around
    ) -> tuple[Losses, Embeddings]:
        """Plain accumulation, for a loss that is a mean over samples; `around` as in `_cached`."""
        # With a single micro-batch, embeddings and targets are there before the loss anyhow.
        ahead = self._settled_ahead(batch, parts, clock, num_passes) if self.method.settles and len(parts) > 1 else None

        def passes() -> tuple[list[Losses], list[Embeddings]]:
            all_losses, all_embeddings = [], []
            for number, part in enumerate(parts[:num_passes]):
                if ahead is None:
                    with statistics_share(self._norms, parts, number):
                        embeddings = self._embed(batch, parts, number, clock.step, "both")
                    with torch.no_grad():
                        self.method.settle(embeddings, clock)
                else:
                    with statistics_share(self._students_norms, parts, number):
                        embeddings = self._embed(batch, parts, number, clock.step, "embeddings")
                    embeddings |= {name: value[:, part] for name, value in ahead.items()}
                share = (part.stop - part.start) / len(samples)
                losses = {name: share * loss for name, loss in self.method.loss(embeddings, samples.part(part)).items()}
                with around.get(number, nullcontext)():
                    self.replicas.backward(losses["loss"])
                all_losses.append({name: loss.detach() for name, loss in losses.items()})
                all_embeddings.append({name: value.detach() for name, value in embeddings.items()})
            return all_losses, all_embeddings

        all_losses, all_embeddings = self._attempt(passes, averages=bool(around))
        total = {name: torch.stack([losses[name] for losses in all_losses]).sum() for name in all_losses[0]}
        return total, concatenate(all_embeddings, parts)

    def _settled_ahead(self, batch: Batch, parts: Sequence[slice], clock: Clock, num_passes: int) -> Embeddings:
        """The targets of the whole rank batch, settled."""

        def make() -> list[Embeddings]:
            made = []
            for number in range(num_passes):
                with torch.no_grad(), statistics_share(self._teachers_norms, parts, number):
                    made.append(self._embed(batch, parts, number, clock.step, "targets"))
            return made

        targets = concatenate(self._attempt(make), parts)
        with torch.no_grad():
            self._attempt(lambda: self.method.settle(targets, clock))
        return targets

    def rehearse(self, batch: Batch, rank_batch: int) -> None:
        """Do once what takes memory in a step of `rank_batch` samples with micro-batches as large as `batch`.

        For the memory plan: the samples may be noise. Leaves no trace but memory that allocators keep. `RanksFailed` on
        all ranks where any is out of memory.
        """
        micro = len(batch)
        parts = [slice(start, min(start + micro, rank_batch)) for start in range(0, rank_batch, micro)]
        of_parts = (x.to(self._device).repeat(len(parts)) for x in (batch.samples.labels, batch.samples.indices))
        labels, indices = (x[:rank_batch] for x in of_parts)
        with self._without_trace():
            self._passes(batch, Samples(labels, indices, epoch=0), parts, START, rehearsed=1)

    def embedding_bytes(self, batch: Batch) -> int:
        """Size of the embeddings of `batch` in bytes."""
        with torch.no_grad(), self._without_trace():
            embeddings = self._attempt(lambda: self._embed(batch, split(len(batch), 0), 0, 0, "both"))
        return sum(value.numel() * value.element_size() for value in embeddings.values())

    @contextmanager
    def _without_trace(self) -> Iterator[None]:
        """Within the context passes move no running statistics, and what gradient they collect is forgotten at its end."""
        failure = None
        with self.replicas.collecting(), statistics_untouched(self._norms):
            try:
                yield
            except distributed.RanksFailed as error:
                failure = error
            self.replicas.discard()
        if failure:
            raise failure


def split(num_samples: int, micro: int) -> list[slice]:
    """Slices of at most `micro` samples over `num_samples`, as few as possible, whose sizes differ by at most one.

    With `micro` 0 one slice holds all.
    """
    return balanced_slices(num_samples, math.ceil(num_samples / micro) if micro else 1)


def concatenate(passed: Sequence[Embeddings], parts: Sequence[slice]) -> Embeddings:
    """The embeddings of micro-batches `parts` as those of one batch, detached, in storage of their own.

    Where only the first were `passed`, they stand for the others too.
    """
    for one, part in zip(passed, parts, strict=False):
        for name, value in one.items():
            assert value.shape[1] == part.stop - part.start, f"{name} has its samples on the second axis: [V, B, ...]"
    repeated = [passed[number % len(passed)] for number in range(len(parts))]
    sizes = [part.stop - part.start for part in parts]
    return {
        name: torch.cat([one[name].detach()[:, :size] for one, size in zip(repeated, sizes, strict=True)], dim=1)
        for name in passed[0]
    }


def backward(embeddings: Embeddings, gradients: dict[str, Tensor | None]) -> None:
    """Back-propagate gradients that arrive at the embeddings, where these were not detached."""
    pairs = [(embeddings[name], g) for name, g in gradients.items() if g is not None and embeddings[name].requires_grad]
    tensors, upstream = zip(*pairs, strict=True)
    torch.autograd.backward(tensors, upstream)
