"""What ranks exchange, on real gloo ranks and at one rank."""

import time
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_contrastive import distributed
from dist_contrastive.config import UserError
from tests.harness import RankError, run_ranks

RANKS = [1, 2, 4]


def rows_of(rank: int, num_rows: int = 3) -> torch.Tensor:
    return torch.randn(num_rows, 5, generator=torch.Generator().manual_seed(rank))


def weights(rank: int, num_ranks: int) -> torch.Tensor:
    """How a rank's loss weighs all ranks' rows."""
    return torch.randn(3 * num_ranks, 5, generator=torch.Generator().manual_seed(100 + rank))


def gather(rank: int, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    mine = rows_of(rank)
    mine = (mine.T.contiguous().T if transposed else mine).requires_grad_()
    everyone = distributed.gather_with_grad(mine)
    # The square makes the gradient depend on what was gathered.
    (weights(rank, distributed.world_size()) * everyone.square()).sum().backward()
    assert mine.grad is not None
    return everyone.detach().numpy(), mine.grad.numpy()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_gather_with_grad_sums_what_all_ranks_losses_send_back(num_ranks: int, transposed: bool) -> None:
    outcomes = run_ranks(gather, num_ranks, transposed)
    everyone = torch.cat([rows_of(rank) for rank in range(num_ranks)])
    total = 2 * everyone * sum(weights(rank, num_ranks) for rank in range(num_ranks))
    for rank, (gathered, gradient) in enumerate(outcomes):
        np.testing.assert_array_equal(gathered, everyone.numpy())
        np.testing.assert_allclose(gradient, total[3 * rank : 3 * rank + 3].numpy(), rtol=1e-5, atol=1e-6)


def test_one_rank_makes_no_group_and_no_copy() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert distributed.gather_with_grad(x) is x
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert (distributed.local_rank(), distributed.local_ranks()) == (0, 1)
    assert distributed.broadcast_object(x) is x
    assert distributed.together(lambda: 3) == 3
    distributed.barrier()
    distributed.shut_down()


def who_am_i(rank: int) -> tuple[int, int, bool, int, int]:
    d = distributed
    return d.rank(), d.world_size(), d.is_main(), d.local_rank(), d.local_ranks()


def test_ranks_know_who_they_are() -> None:
    assert run_ranks(who_am_i, 2) == [(0, 2, True, 0, 2), (1, 2, False, 1, 2)]


SHARES = {1: [3], 2: [0, 3], 4: [2, 5, 0, 1]}


def gather_on_main(rank: int, piece_bytes: int) -> np.ndarray:
    sizes = SHARES[distributed.world_size()]
    rows = torch.full((sum(sizes) if rank == 0 else sizes[rank], 5), -1.0)
    rows[: sizes[rank]] = rows_of(rank, sizes[rank])
    distributed.PIECE_BYTES = piece_bytes
    distributed.gather_to_main(rows, sizes)
    return rows.numpy()


@pytest.mark.parametrize("piece_bytes", [1, 40, 1000])  # a row, two, all at once
@pytest.mark.parametrize("num_ranks", RANKS)
def test_rank_0_gets_uneven_shares_in_rank_order_and_the_others_keep_theirs(num_ranks: int, piece_bytes: int) -> None:
    shares = [rows_of(rank, rows).numpy() for rank, rows in enumerate(SHARES[num_ranks])]
    everyone, *others = run_ranks(gather_on_main, num_ranks, piece_bytes)
    np.testing.assert_array_equal(everyone, np.concatenate(shares))
    for rows, share in zip(others, shares[1:], strict=True):
        np.testing.assert_array_equal(rows, share)


def gather_even(rank: int, transposed: bool) -> tuple[np.ndarray, bool]:
    mine = rows_of(rank).requires_grad_()
    everyone = distributed.all_gather(mine.T.contiguous().T if transposed else mine)
    return everyone.numpy(), everyone.requires_grad


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_all_gather_takes_even_shares_in_rank_order(num_ranks: int, transposed: bool) -> None:
    everyone = torch.cat([rows_of(rank) for rank in range(num_ranks)])
    for gathered, requires_grad in run_ranks(gather_even, num_ranks, transposed):
        np.testing.assert_array_equal(gathered, everyone.numpy())
        assert not requires_grad


def sum_of_rows(rank: int, transposed: bool) -> tuple[np.ndarray, np.ndarray, bool]:
    whole = weights(rank, distributed.world_size())
    whole = (whole.T.contiguous().T if transposed else whole).requires_grad_()
    rows = distributed.reduce_scatter_sum(whole)
    return whole.detach().numpy(), rows.numpy(), rows.requires_grad


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_reduce_scatter_sum_gives_each_rank_its_rows_and_leaves_its_argument_alone(
    num_ranks: int, transposed: bool
) -> None:
    total = np.sum([weights(rank, num_ranks).numpy() for rank in range(num_ranks)], 0)
    for rank, (whole, rows, requires_grad) in enumerate(run_ranks(sum_of_rows, num_ranks, transposed)):
        np.testing.assert_array_equal(whole, weights(rank, num_ranks).numpy())
        np.testing.assert_allclose(rows, total[3 * rank : 3 * rank + 3], rtol=1e-5, atol=1e-6)
        assert not requires_grad


def sum_over_ranks(rank: int) -> tuple[np.ndarray, np.ndarray]:
    mine = rows_of(rank).requires_grad_()
    total = distributed.all_reduce_sum(mine.T)
    assert not total.requires_grad
    return mine.detach().numpy(), total.numpy()


@pytest.mark.parametrize("num_ranks", RANKS)
def test_all_reduce_sum_leaves_its_argument_alone(num_ranks: int) -> None:
    for rank, (mine, total) in enumerate(run_ranks(sum_over_ranks, num_ranks)):
        np.testing.assert_array_equal(mine, rows_of(rank).numpy())
        np.testing.assert_allclose(
            total.T, torch.stack([rows_of(r) for r in range(num_ranks)]).sum(0).numpy(), rtol=1e-5, atol=1e-6
        )


def call_together(rank: int, bad_ranks: list[int]) -> str:
    def call() -> str:
        if rank in bad_ranks:
            raise UserError(f"rank {rank} can't")
        return f"rank {rank} can"

    try:
        return distributed.together(call)
    except UserError as error:
        # The group still works: no rank is left waiting in another collective.
        assert distributed.all_reduce_sum(torch.ones(1)) == distributed.world_size()
        return str(error)


@pytest.mark.parametrize(
    ("bad_ranks", "outcomes"),
    [
        ([], ["rank 0 can", "rank 1 can"]),
        ([0], ["rank 0 can't", "rank 0 can't"]),
        ([1], ["rank 1 can't", "rank 1 can't"]),
        ([0, 1], ["rank 0 can't", "rank 1 can't"]),
    ],
)
def test_together_raises_a_users_mistake_on_all_ranks(bad_ranks: list[int], outcomes: list[str]) -> None:
    assert run_ranks(call_together, 2, bad_ranks) == outcomes


def sum_of(rank: int) -> tuple[np.ndarray, np.ndarray]:
    mine = rows_of(rank).requires_grad_()
    total = distributed.sum_with_grad(mine)
    (weights(rank, 1) * total.square()).sum().backward()
    assert mine.grad is not None
    return total.detach().numpy(), mine.grad.numpy()


@pytest.mark.parametrize("num_ranks", RANKS)
def test_sum_with_grad_sums_what_all_ranks_losses_send_back(num_ranks: int) -> None:
    total = torch.stack([rows_of(rank) for rank in range(num_ranks)]).sum(0)
    gradient = 2 * total * sum(weights(rank, 1) for rank in range(num_ranks))
    for found, its_gradient in run_ranks(sum_of, num_ranks):
        np.testing.assert_allclose(found, total.numpy(), rtol=1e-5)
        np.testing.assert_allclose(its_gradient, gradient.numpy(), rtol=1e-5, atol=1e-6)


def attempt_with_failures(rank: int, bad_ranks: dict[int, int]) -> str:
    """Small sums, two collectives and a backward pass; rank r fails before number `bad_ranks[r]` of these."""

    def fail_before(number: int) -> None:
        if number == bad_ranks.get(rank):
            raise MemoryError

    def call() -> float:
        fail_before(0)
        distributed.small_sum(torch.ones(2).double())
        fail_before(1)
        small = distributed.small_sum(torch.arange(3).double())
        fail_before(2)
        total = distributed.all_reduce_sum(small[1:2])
        fail_before(3)
        rows = torch.ones(1, 1, requires_grad=True)
        everyone = distributed.gather_with_grad(rows)
        fail_before(4)
        everyone.sum().backward()
        fail_before(5)
        small = distributed.small_sum(torch.ones(1).double())
        fail_before(6)
        assert rows.grad is not None
        return float(total + rows.grad + small)

    try:
        outcome = str(
            distributed.attempt(call, lambda error: isinstance(error, MemoryError), torch.device("cpu"), message_size=3)
        )
    except distributed.RanksFailed as failure:
        outcome = f"failed on {failure.ranks}"
    # The group still works, and without the questions: nobody is left waiting.
    assert distributed.all_reduce_sum(torch.ones(1)) == distributed.world_size()
    return outcome


@pytest.mark.parametrize("moment", range(7))
@pytest.mark.parametrize("bad_ranks", [[0], [2], [0, 1], [0, 1, 2]])
def test_an_attempt_fails_on_all_ranks_wherever_one_fails(bad_ranks: list[int], moment: int) -> None:
    outcomes = run_ranks(attempt_with_failures, 3, dict.fromkeys(bad_ranks, moment))
    assert outcomes == [f"failed on {bad_ranks}"] * 3


@pytest.mark.parametrize(
    ("bad_ranks", "failed"),
    [
        ({0: 0, 1: 2}, [0, 1]),  # with only sums in between that nobody waits for, both are known
        ({0: 0, 1: 1, 2: 2}, [0, 1, 2]),
        ({0: 1, 1: 3}, [0]),  # rank 1 has heard of rank 0 before it would fail
        ({0: 5, 2: 6}, [0, 2]),
    ],
)
def test_ranks_that_fail_at_different_moments(bad_ranks: dict[int, int], failed: list[int]) -> None:
    assert run_ranks(attempt_with_failures, 3, bad_ranks) == [f"failed on {failed}"] * 3


class OfAGPU(distributed._Attempt):
    """An attempt on a device that adds up when it comes to it: the host goes on, and reads nothing of what will be there."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.under_way: list[dist.Work] = []

    def small_sum(self, x: torch.Tensor) -> torch.Tensor:
        message = torch.zeros(self._room, dtype=torch.float64)
        message[: len(x)] = x
        self.under_way.append(self._add_up(message))
        return message[: len(x)]


def attempt_small_sums(rank: int, bad_ranks: dict[int, int], asks: bool, like_a_gpu: bool) -> tuple[str, int]:
    """Three small sums, with or without a question after each; rank r fails before number `bad_ranks[r]` of these, or after
    all of them. What came of it, and how many collectives the rank has come to."""
    if like_a_gpu:
        distributed._Attempt = OfAGPU  # type: ignore[assignment, misc]

    def call() -> OfAGPU | None:
        for number in range(4):
            if number == bad_ranks.get(rank):
                raise MemoryError
            if number < 3:
                distributed.small_sum(torch.full((number,), 1.0).double())
                if asks:
                    distributed.barrier()
        return distributed._attempt if like_a_gpu else None  # type: ignore[return-value]

    try:
        attempt = distributed.attempt(
            call, lambda error: isinstance(error, MemoryError), torch.device("cpu"), message_size=2
        )
        for work in attempt.under_way if attempt else ():
            work.wait()
        outcome = "done"
    except distributed.RanksFailed as failure:
        outcome = f"failed on {failure.ranks}"
    assert distributed.all_reduce_sum(torch.ones(1)) == distributed.world_size()
    distributed.barrier()
    return outcome, distributed.arrivals()


@pytest.mark.parametrize("like_a_gpu", [False, True])
@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize(
    ("num_ranks", "bad_ranks", "failed"),
    [
        (2, {}, []),
        (2, {0: 1}, [0]),
        (2, {1: 0}, [1]),
        (2, {1: 3}, [1]),
        (2, {0: 2, 1: 2}, [0, 1]),
        (4, {3: 1}, [3]),
        (4, {0: 2, 2: 2}, [0, 2]),
        (4, {0: 1, 1: 1, 2: 1, 3: 1}, [0, 1, 2, 3]),
    ],
)
def test_a_failure_between_small_sums(
    num_ranks: int, bad_ranks: dict[int, int], failed: list[int], asks: bool, like_a_gpu: bool
) -> None:
    outcomes = run_ranks(attempt_small_sums, num_ranks, bad_ranks, asks, like_a_gpu)
    assert [outcome for outcome, _ in outcomes] == [f"failed on {failed}" if failed else "done"] * num_ranks
    assert len({arrivals for _, arrivals in outcomes}) == 1, "none seems to lag behind the others"


@pytest.mark.parametrize("like_a_gpu", [False, True])
def test_failures_between_different_small_sums(like_a_gpu: bool) -> None:
    outcomes = run_ranks(attempt_small_sums, 4, {0: 0, 1: 1, 2: 2, 3: 3}, False, like_a_gpu)
    assert [outcome for outcome, _ in outcomes] == ["failed on [0, 1, 2, 3]"] * 4


def test_an_attempt_of_one_rank() -> None:
    assert attempt_with_failures(0, {}) == "3.0"
    assert attempt_with_failures(0, {0: 2}) == "failed on [0]"


def test_an_attempt_that_all_ranks_can_gives_its_value() -> None:
    assert run_ranks(attempt_with_failures, 2, {}) == ["8.0", "8.0"]


def sum_too_much(rank: int) -> None:
    distributed.attempt(
        lambda: distributed.small_sum(torch.ones(4).double()), lambda error: False, torch.device("cpu"), message_size=3
    )


def test_a_sum_for_which_an_attempt_has_no_room() -> None:
    with pytest.raises(RankError, match="4 numbers, but an attempt with room for 3"):
        run_ranks(sum_too_much, 2)


def attempt_the_unexpected(rank: int) -> None:
    def call() -> None:
        raise KeyError("unexpected")

    distributed.attempt(call, lambda error: isinstance(error, MemoryError), torch.device("cpu"))


def test_an_error_that_nobody_expects_is_raised_as_itself() -> None:
    with pytest.raises(RankError, match="KeyError: 'unexpected'"):
        run_ranks(attempt_the_unexpected, 1)


def broadcast(rank: int) -> tuple[object, list[np.ndarray]]:
    module = nn.BatchNorm1d(3)
    for buffer in module.buffers():
        buffer += rank
    distributed.broadcast_buffers(module)
    return distributed.broadcast_object({"from": rank}), [buffer.numpy() for buffer in module.buffers()]


def test_rank_0_tells_the_others() -> None:
    for value, buffers in run_ranks(broadcast, 2):
        assert value == {"from": 0}
        for buffer, expected in zip(buffers, nn.BatchNorm1d(3).buffers(), strict=True):
            np.testing.assert_array_equal(buffer, expected.numpy())


def wait_for_rank_0(rank: int, over_messages: bool) -> None:
    dist.set_timeout(timedelta(seconds=1))
    if rank == 0:
        time.sleep(3)
    if over_messages:
        assert distributed.together(lambda: rank) == rank
    else:
        distributed.all_reduce_sum(torch.ones(1))


def test_messages_outlast_the_time_out_of_what_goes_between_devices() -> None:
    run_ranks(wait_for_rank_0, 2, True)
    with pytest.raises(RankError, match=r"(?i)timed out|timeout"):
        run_ranks(wait_for_rank_0, 2, False)


def answer(rank: int) -> tuple[list[list[int]], bool, bool]:
    numbers = distributed.gather_numbers(10 - rank, 2**40 + rank)
    return numbers, distributed.any_rank(rank == 1), distributed.any_rank(False)


def test_hosts_ask_one_another() -> None:
    assert run_ranks(answer, 2) == [([[10, 9], [2**40, 2**40 + 1]], True, False)] * 2
    assert answer(0) == ([[10], [2**40]], False, False)


def fail_on_rank_1(rank: int) -> None:
    assert rank == 0, "rank 1 fails"


def test_the_harness_reports_a_failing_rank() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2.*rank 1 fails"):
        run_ranks(fail_on_rank_1, 2)
