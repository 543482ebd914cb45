"""Ranks and what they exchange. Every function is the identity at one rank, in the same code.

Tensors of a step go over the process group of the launch (NCCL on GPUs), with its time-out; gradients, for which nothing in a
backward pass waits, over one of their own, so that nothing waits behind them. Messages (objects, questions,
flags) go from host to host over a gloo group of their own: no GPU stands still for them, and as they may wait for what one
rank does by itself for hours, their time-out is no bound on that; `liveness` is, which tells work from a rank that is lost.

At one rank there is no process group, and none is made: a world of one needs no communication.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_contrastive.batch import Share
from dist_contrastive.config import UserError
from dist_contrastive.signals import Stopped

T = TypeVar("T")

SHUT_DOWN_S = 20.0
MESSAGE_TIMEOUT = timedelta(days=7)
POLL_S = 0.001
PIECE_BYTES = 64 << 20
"""Of what is sent from one host to another at a time."""


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def row_offset(num_rows: int) -> int:
    """The row at which this rank's `num_rows` rows start among those of all ranks, gathered in rank order."""
    return rank() * num_rows


def share_of(global_batch: int) -> Share:
    """This rank's share of global batches of that many samples; `UserError` where the ranks can't share them equally."""
    return Share(global_batch, rank(), world_size())


def is_main() -> bool:
    """Whether this is rank 0, which alone prints and writes."""
    return rank() == 0


def local_rank() -> int:
    """This rank's number on its own host."""
    return int(os.environ.get("LOCAL_RANK", 0)) if is_distributed() else 0


def local_ranks() -> int:
    """How many ranks share this host; the launcher says so in LOCAL_WORLD_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if is_distributed() else 1


_arrivals = 0


def arrivals() -> int:
    """How many collectives this rank has come to: the rank with the smallest number is the one that the others wait for."""
    return _arrivals


def arrive() -> None:
    """Count a collective, of this module or of a library, that this rank is about to enter."""
    global _arrivals
    _arrivals += 1


_messages: dist.ProcessGroup | None = None
_gradients: dist.ProcessGroup | None = None


def open_groups(timeout: timedelta) -> None:
    """Connect the ranks for messages and for gradients; all call it once, after the process group is there and before they use
    this module.

    `timeout` bounds how long they wait for one another here, and for gradients; messages may wait for MESSAGE_TIMEOUT.
    """
    global _messages, _gradients
    if world_size() > 1 and _messages is None:
        _messages = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
        dist.set_timeout(MESSAGE_TIMEOUT, _messages)
        _gradients = cast(dist.ProcessGroup, dist.new_group(backend=dist.get_backend(), timeout=timeout))


def messages() -> dist.ProcessGroup:
    """The group for messages."""
    assert _messages is not None, "the ranks are not connected for messages: call open_groups"
    return _messages


def shut_down() -> None:
    """Leave the process groups, if there are any; wait no longer than SHUT_DOWN_S for what NCCL has still to do.

    A rank that was stopped by a mistake of its own leaves collectives behind that no other rank will end.
    """
    global _messages, _gradients
    _messages = _gradients = None
    if is_distributed():
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(SHUT_DOWN_S)


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        _before_collective()
        arrive()
        dist.barrier(group=messages())


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` on every rank. The value is pickled: only for what the ranks of one run tell each other."""
    if world_size() == 1:
        return value
    box = [value]
    _before_collective()
    arrive()
    dist.broadcast_object_list(box, src=0, group=messages())
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. Pickled, as in `broadcast_object`."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    _before_collective()
    arrive()
    dist.all_gather_object(values, value, group=messages())
    return values


def gather_numbers(*values: int) -> list[list[int]]:
    """For each of `values`, every rank's, in rank order, on every rank."""
    if world_size() == 1:
        return [[value] for value in values]
    _before_collective()
    numbers, work = _send_numbers(*values)
    work.wait()
    found: list[list[int]] = numbers.tolist()
    return found


def any_rank(answer: bool) -> bool:
    """Whether any rank's answer is yes."""
    (answers,) = gather_numbers(int(answer))
    return any(answers)


def _send_numbers(*values: int) -> tuple[Tensor, dist.Work]:
    """A tensor that has, for each of `values`, all ranks' in rank order once what comes with it is done."""
    numbers = torch.zeros(len(values), world_size(), dtype=torch.int64)
    numbers[:, rank()] = torch.tensor(values)
    return numbers, _started(dist.all_reduce(numbers, group=messages(), async_op=True))


def _started(work: dist.Work | None) -> dist.Work:
    """A collective that is under way; counted."""
    arrive()
    assert work is not None
    return work


def start_average(x: Tensor) -> dist.Work:
    """Start to average gradients over ranks, in place; nothing but gradients waits for what is under way here."""
    return _started(dist.all_reduce(x, op=dist.ReduceOp.AVG, group=_gradients, async_op=True))


def broadcast_parameters(module: nn.Module) -> None:
    """Rank 0's parameters and buffers of `module` on every rank, in place."""
    broadcast_buffers(module)
    if world_size() > 1:
        for parameter in module.parameters():
            whole = parameter.detach().contiguous()
            arrive()
            dist.broadcast(whole, src=0)
            parameter.data.copy_(whole)


def broadcast_buffers(module: nn.Module) -> None:
    """Rank 0's buffers of `module` on every rank, in place."""
    if world_size() > 1:
        _before_collective()
        for buffer in module.buffers():
            arrive()
            dist.broadcast(buffer, src=0)


def together(call: Callable[[], T]) -> T:
    """This rank's `call()`; a `UserError` or a `Stopped` in any rank's call is raised on all of them, so that none waits for
    the others. A mistake of the user comes first."""
    result, error, stopped = None, None, False
    try:
        result = call()
    except UserError as caught:
        error = caught
    except Stopped:
        stopped = True
    outcomes = gather_objects((None if error is None else str(error), stopped))
    first = next((text for text, _ in outcomes if text is not None), None)
    if error is None and first is not None:
        error = UserError(first)
    if error is not None:
        raise error
    if any(stopped for _, stopped in outcomes):
        raise Stopped
    return result  # type: ignore[return-value]


class RanksFailed(Exception):
    """Some ranks could not do what `attempt` asked of all; raised on every rank."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"failed on rank(s) {ranks}")
        self.ranks = ranks


class _Attempt:
    """What the ranks tell one another while they attempt something together.

    Questions are messages, small sums go over the device's own group, where only the device waits for them. A rank that has
    failed has nothing to do but to answer: it takes part in the next question, whenever that comes, and meanwhile in one
    small sum after the other, as its device's work would stand still, and with it a host that waits for its device (an
    allocator that is short of memory does, too), if a sum had to wait for the question. When the question is answered each
    rank knows whether any has failed, and if so each catches up on sums, until all have done as many.

    All messages are as long as the longest, as a failed rank does not know which layer the others have come to. For a ResNet-50
    that is 2 × 2,048 + 1 numbers of 8 bytes, 33 kB, where its layers have 8 kB on average: in such sums it is the number of
    ranks that counts, not that of bytes.

    Collectives over another group, which are known beforehand, are the caller's: `catch_up` starts what is left of them.
    """

    def __init__(self, device: torch.device, message_size: int, catch_up: Callable[[], list[dist.Work]]) -> None:
        self._device = device
        self._room = message_size
        self._catch_up = catch_up
        self._sums = 0

    def small_sum(self, x: Tensor) -> Tensor:
        """The sum over ranks. Nobody waits to hear whether all are there; a rank that has failed adds zeros."""
        assert len(x) <= self._room, f"{len(x)} numbers, but an attempt with room for {self._room}"
        message = self._zeros()
        message[: len(x)] = x
        self._add_up(message).wait()  # a GPU waits, not its host
        return message[: len(x)]

    def ask(self) -> None:
        """`RanksFailed` if any rank has failed."""
        if world_size() > 1:
            answers, asked = _send_numbers(0)
            asked.wait()
            self._conclude(answers, [])

    def fail(self) -> None:
        """Answer the other ranks until they ask; then, `RanksFailed`."""
        if world_size() == 1:
            raise RanksFailed([0])
        answers, asked = _send_numbers(1)
        self._catch_up()
        sums: list[dist.Work] = []
        while self._room and not asked.is_completed():
            sums.append(self._add_up(self._zeros()))
            while not (sums[-1].is_completed() or asked.is_completed()):
                time.sleep(POLL_S)
        asked.wait()
        self._conclude(answers, sums)

    def _zeros(self) -> Tensor:
        return torch.zeros(self._room, device=self._device, dtype=torch.float64)

    def _add_up(self, message: Tensor) -> dist.Work:
        """Start the sum over ranks, in place."""
        self._sums += 1
        return _started(dist.all_reduce(message, async_op=True))

    def _conclude(self, answers: Tensor, sums: list[dist.Work]) -> None:
        """`RanksFailed` where `answers` say so, once all ranks have done as many small sums; some of them are under way."""
        ranks = answers[0].nonzero().flatten().tolist()
        if not ranks:
            return
        counts, counted = _send_numbers(self._sums)
        counted.wait()
        sums += [self._add_up(self._zeros()) for _ in range(int(counts.max()) - self._sums)]
        for work in [*sums, *self._catch_up()]:
            work.wait()
        raise RanksFailed(ranks)


_attempt: _Attempt | None = None


def attempt(
    call: Callable[[], T],
    is_expected: Callable[[Exception], bool],
    device: torch.device,
    *,
    message_size: int = 0,
    catch_up: Callable[[], list[dist.Work]] = list,
) -> T:
    """This rank's `call()`, in which collectives of this module may be used; all ranks call it together.

    Where an error for which `is_expected` holds is raised in any rank's call, `RanksFailed` is raised on all ranks, in
    place of a rank that waits for ever in a collective which the failed one never reaches: within the call each
    collective of this module is preceded by the question whether all ranks are there, which a failed rank answers, too.
    `small_sum` alone goes without the question; `message_size` is the largest number of elements that it will be given, the
    same on all ranks. `catch_up` is for calls that use `start_average`: it starts what this rank would still have averaged in
    its call, whatever that is now, and returns all that is under way; a rank may call it twice.
    """
    global _attempt
    result, failed, text = None, False, ""
    this = _attempt = _Attempt(device, message_size, catch_up)
    try:
        result = call()
    except RanksFailed:  # another rank's; this one has heard of it
        raise
    except Exception as error:
        if not is_expected(error):
            raise
        failed, text = True, f"{type(error).__name__}: {error}"
    finally:
        _attempt = None
    # Outside the handler: the error's traceback, and with it what the failed call held, is gone by now.
    if failed:
        try:
            this.fail()
        except RanksFailed:
            raise
        except Exception as error:  # a communicator that broke together with the call, say: what broke it must be seen
            error.add_note(f"It came while the other ranks were told of another error:\n{text}")
            raise
    this.ask()
    return result  # type: ignore[return-value]


def _before_collective() -> None:
    if _attempt is not None:
        _attempt.ask()


def small_sum(x: Tensor) -> Tensor:
    """The sum over ranks of a float64 vector `x`, a new tensor without gradient.

    Within an attempt no host waits for it on a GPU's account, and the sum lacks what a failed rank would have added: the
    attempt's end tells.
    """
    if world_size() == 1:
        return x.detach().clone()
    if _attempt is not None:
        return _attempt.small_sum(x.detach())
    return all_reduce_sum(x)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of `x` over ranks, in a new tensor of the same shape; carries no gradient."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        _before_collective()
        arrive()
        dist.all_reduce(total)
    return total


def all_gather(x: Tensor) -> Tensor:
    """The rows of all ranks in rank order, without gradient: [n, ...] on each rank to [W·n, ...].

    Every rank must have the same number of rows: then no GPU waits until the host knows how many there are.
    """
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous()
    everyone = x.new_empty((world_size() * len(x), *x.shape[1:]))
    _before_collective()
    arrive()
    dist.all_gather_single(everyone, x)
    return everyone


def gather_to_main(rows: Tensor, sizes: Sequence[int]) -> None:
    """Rank 0's host gets the rows of all ranks in rank order, without a second copy of them anywhere.

    `rows` lies on the host. It is this rank's share [sizes[rank], ...], but on rank 0 has room for all, [sum(sizes), ...], and
    that rank's share in front: those of the others are written behind it, PIECE_BYTES at a time. All ranks know the `sizes`.
    """
    if world_size() == 1:
        return
    _before_collective()
    arrive()
    step = max(1, PIECE_BYTES // max(1, rows[:1].nbytes))
    if not is_main():
        for piece in rows.split(step) if len(rows) else ():
            dist.send(piece, dst=0, group=messages())
        return
    _, *behind = rows.split(list(sizes))
    for source, share in enumerate(behind, start=1):
        for piece in share.split(step) if len(share) else ():
            dist.recv(piece, src=source, group=messages())


def reduce_scatter_sum(x: Tensor) -> Tensor:
    """This rank's rows of the sum of `x` over ranks, in a new tensor: [W·n, ...] on each rank to [n, ...]; carries no gradient.

    Of an all-reduce it is the first half, which sends half as much, and nobody holds the rows of others.
    """
    x = x.detach().contiguous()
    if world_size() == 1:
        return x.clone()
    rows = x.new_empty((len(x) // world_size(), *x.shape[1:]))
    _before_collective()
    arrive()
    dist.reduce_scatter_single(rows, x)
    return rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every rank's loss depends on this rank's rows, so their gradient is the sum over all ranks' losses.
        return reduce_scatter_sum(grads[0])


def gather_with_grad(x: Tensor) -> Tensor:
    """The rows of all ranks in rank order, with gradient: [n, ...] on each rank to [W·n, ...].

    The backward pass sums the gradients that all W ranks' losses send to this rank's rows. With rank-local losses that
    are means over the rank's own anchors, the average over ranks then equals the gradient of the mean over all
    anchors, as at one rank. Every rank must have the same number of rows and must take part in both passes.
    """
    if world_size() == 1:
        return x
    out: Tensor = _Gather.apply(x)
    return out


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every rank's loss depends on this rank's summand, so its gradient is the sum over all ranks' losses.
        return all_reduce_sum(grads[0])


def sum_with_grad(x: Tensor) -> Tensor:
    """The sum of `x` over ranks, of the same shape, with gradient.

    The backward pass sums what all ranks' losses send back, as in `gather_with_grad`: a loss that every rank computes
    from the sum has, after the average over ranks, the gradient that one rank with all samples would have.
    """
    if world_size() == 1:
        return x
    out: Tensor = _Sum.apply(x)
    return out
