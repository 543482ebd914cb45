"""Gradients in buckets, which ranks average while the backward pass that completes them goes on.

torch's DistributedDataParallel does the same, but for three things. It averages in a backward pass in which every parameter takes
part, where the parameters of a loss have their gradient before the last micro-batch is passed. It can't be left in mid-pass and
used again, which a rank that runs out of memory must do. And its collectives are among those that the passes wait for (sums
of SyncBatchNorm), which would stand in line behind megabytes of gradients: these have a process group of their own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_contrastive import distributed

FIRST_BYTES, BYTES = 2**20, 25 * 2**20
"""Of the first bucket, which is soon full, and of the others; DistributedDataParallel's."""
ALIGNMENT = 4
"""Numbers to whose multiples gradients are aligned: 16 bytes, as fused kernels like them."""


class Buckets:
    """The gradients of `parameters`, of one type and device, in one piece of memory that is cut into buckets.

    A step begins with `begin`. Backward passes add to the gradients, whose home is in the buckets: what autograd makes anew is
    copied there once. The last one runs within `averaging`, in which a bucket is sent as soon as it and all before it are
    complete: then every rank sends the same buckets in the same order, whatever its own is. All of them have been sent when
    the context ends, those too whose parameters got no gradient, which is zero then.

    Parameters are at first in the reverse of their own order. After the first step all ranks take the order in which rank 0's
    gradients were complete, where those that the last pass does not reach (a loss's own) come first. Where a gradient lies
    decides in which order ranks are added up, and so about its rounding: a run that goes on takes the order over (`places`).

    Where a rank fails in `averaging`, or before it comes to that, others may wait for its part in any bucket. It sends all that
    it has not sent, whatever is in them, and so does each rank when it hears of the failure (`catch_up`): all have sent all, and
    the step begins again.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """All ranks call it together, with the same parameters."""
        self._parameters = list(parameters)
        dtypes, devices = ({getattr(p, name) for p in parameters} for name in ("dtype", "device"))
        assert len(dtypes) == len(devices) == 1, "parameters of one type on one device"
        self._sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
        self._memory = torch.zeros(sum(self._sizes), dtype=dtypes.pop(), device=devices.pop())
        self._views: list[Tensor] = []
        self._buckets: list[Tensor] = []
        self._bucket_of: list[int] = []
        self._early: set[int] = set()
        self._learnt: list[int] | None = None
        self._lay_out([*reversed(range(len(self._parameters)))])
        self._is_last = False
        self._completed: list[int] = []
        """Parameters in the order in which the last pass completed their gradients."""
        for number, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._arrive, number))
        # Connections are made now, and take their memory: not in a step, in which a rank may be short of it.
        self.begin()
        self._wait()
        self._memory.zero_()
        self.begin()

    def _lay_out(self, order: Sequence[int]) -> None:
        """Give each gradient its place: parameters in `order`, in as few buckets as their sizes allow."""
        self._views = [self._memory] * len(self._parameters)
        self._bucket_of = [0] * len(self._parameters)
        ends: list[int] = []
        start = offset = 0
        itemsize = self._memory.element_size()
        for number in order:
            if (offset - start) * itemsize >= (BYTES if ends else FIRST_BYTES):
                ends.append(offset)
                start = offset
            parameter = self._parameters[number]
            # As the parameter lies, which is how autograd makes its gradient and how optimizers read both.
            self._views[number] = self._memory[offset:].as_strided(parameter.shape, parameter.stride())
            self._bucket_of[number] = len(ends)
            offset += self._sizes[number]
        self._buckets = [self._memory[a:b] for a, b in zip([0, *ends], [*ends, offset], strict=True)]

    def begin(self) -> None:
        """A step begins; no gradient is there. All ranks call it together."""
        places = self.places
        if places and self._learnt is None:
            self.take([of_parameter[0] for of_parameter in distributed.gather_numbers(*places)])
        self._works: list[dist.Work] = []
        self._completed = []

    @property
    def places(self) -> list[int]:
        """At which place the last pass completes each parameter's gradient, -1 where it does not; empty before the first step."""
        if self._learnt is not None or not self._completed:
            return self._learnt or []
        place_of = {number: place for place, number in enumerate(self._completed)}
        return [place_of.get(number, -1) for number in range(len(self._parameters))]

    def take(self, places: Sequence[int]) -> None:
        """Lay gradients out by rank 0's `places`; between steps, and on all ranks."""
        self._learnt = list(places)
        self._early = {number for number, place in enumerate(places) if place < 0}
        self._lay_out(sorted(range(len(places)), key=lambda number: places[number]))
        self._memory.zero_()
        for parameter in self._parameters:
            parameter.grad = None

    def forget(self) -> None:
        """What was completed is no whole step's."""
        self._completed = []

    @contextmanager
    def averaging(self) -> Iterator[None]:
        """Within the context a backward pass completes the gradients; after it they are averages over ranks."""
        self._missing = [0] * len(self._buckets)
        for number, bucket in enumerate(self._bucket_of):
            self._missing[bucket] += number not in self._early
        self._is_last = True
        try:
            self._send_complete()
            yield
            for bucket in range(len(self._works), len(self._buckets)):
                self._missing[bucket] = 0
            self._send_complete()
            self._wait()
        finally:
            self._is_last = False

    def catch_up(self) -> list[dist.Work]:
        """Start to send what is not sent, whatever it is; all that is under way. The gradients are lost."""
        for bucket in self._buckets[len(self._works) :]:
            self._works.append(distributed.start_average(bucket))
        return self._works

    def _arrive(self, number: int, parameter: Tensor) -> None:
        """A backward pass has added to a gradient."""
        if not self._is_last:
            self._bring_home([number])
            return
        self._completed.append(number)
        bucket = self._bucket_of[number]
        assert len(self._works) <= bucket, "a gradient is added to when it was already sent"
        self._missing[bucket] -= 1
        self._send_complete()

    def _send_complete(self) -> None:
        while (bucket := len(self._works)) < len(self._buckets) and not self._missing[bucket]:
            self._bring_home([number for number, place in enumerate(self._bucket_of) if place == bucket])
            self._works.append(distributed.start_average(self._buckets[bucket]))

    def _bring_home(self, numbers: Sequence[int]) -> None:
        """Copy gradients to their place in the buckets, and let that be the parameters' `grad`."""
        away = [number for number in numbers if self._parameters[number].grad is not self._views[number]]
        found = [(self._views[number], self._parameters[number].grad) for number in away]
        made = [(view, gradient) for view, gradient in found if gradient is not None]
        if made:
            torch._foreach_copy_([view for view, _ in made], [gradient for _, gradient in made])
        for view, gradient in found:
            if gradient is None:
                view.zero_()
        for number in away:
            self._parameters[number].grad = self._views[number]

    def _wait(self) -> None:
        """Let the device wait until all buckets are averaged."""
        for work in self.catch_up():
            work.wait()
