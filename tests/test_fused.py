"""Losses by kernels: in Triton's interpreter against float64, compiled ahead of time, on a GPU where there is one."""

import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_contrastive.losses import fused, infonce
from dist_contrastive.losses.fused import STAGES, TILES, Tiles

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dist_contrastive.losses import kernels  # noqa: E402

SMALL = Tiles(32, 16, 1)
"""The interpreter takes 11 ms for a program, whatever its size; still, several tiles each way."""


@dataclass(frozen=True)
class Case:
    """NT-Xent of the last of `ranks`."""

    num_views: int
    batch_size: int
    ranks: int
    size: int
    temperature: float
    decoupled: bool = False
    dtype: torch.dtype = torch.float32

    def embeddings(self) -> Tensor:
        rows = self.ranks * self.num_views * self.batch_size
        generator = torch.Generator().manual_seed(rows)
        return F.normalize(torch.randn(rows, self.size, generator=generator), dim=1).to(self.dtype)

    @property
    def offset(self) -> int:
        return (self.ranks - 1) * self.num_views * self.batch_size

    def of(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return partial(
            loss,
            offset=self.offset,
            num_views=self.num_views,
            temperature=self.temperature,
            decoupled=self.decoupled,
        )


def nt_xent_reference(
    anchors: Tensor, everyone: Tensor, *, offset: int, num_views: int, temperature: float, decoupled: bool
) -> Tensor:
    """Over the whole matrix, in the precision of its inputs."""
    logits = anchors @ everyone.T / temperature
    rows, columns = torch.arange(len(anchors))[:, None], torch.arange(len(everyone)) - offset
    own = rows == columns
    batch_size = len(anchors) // num_views
    sample = (columns >= 0) & (columns < len(anchors)) & (rows % batch_size == columns % batch_size)
    pulled = (logits * (sample & ~own)).sum(1) / (num_views - 1)
    return (logits.masked_fill(sample if decoupled else own, -torch.inf).logsumexp(1) - pulled).mean()


def with_gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The loss of copies of the inputs, and its gradients at them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    (3 * value).backward()
    return [value.detach(), *(x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def errors(way: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> list[float]:
    """The relative errors of the loss and of each gradient beside float64."""
    expected = with_gradients(reference, *(x.double() for x in inputs))
    return [error(*pair) for pair in zip(with_gradients(way, *inputs), expected, strict=True)]


def nt_xent_errors(case: Case) -> list[float]:
    everyone = case.embeddings()
    anchors = everyone[case.offset : case.offset + case.num_views * case.batch_size]
    fused_loss = case.of(partial(infonce._fused_nt_xent, tiles=SMALL))
    return errors(fused_loss, case.of(nt_xent_reference), anchors, everyone)


def no_gradient_error(case: Case) -> float:
    """Of a loss that is only looked at, for which kernels have less to do."""
    everyone = case.embeddings()
    anchors = everyone[case.offset : case.offset + case.num_views * case.batch_size]
    with torch.no_grad():
        found = case.of(partial(infonce._fused_nt_xent, tiles=SMALL))(anchors, everyone)
    return error(found, case.of(nt_xent_reference)(anchors.double(), everyone.double()))


def shares_errors(num_ranks: int) -> list[float]:
    """Of the mean over ranks, each with its offset, beside one rank's over all."""
    case = Case(2, 12, 1, 24, 0.1)
    everyone = case.embeddings()
    share = len(everyone) // num_ranks

    def over_ranks(rows: Tensor) -> Tensor:
        losses = [
            infonce._fused_nt_xent(
                rows[start : start + share],
                rows,
                tiles=SMALL,
                offset=start,
                num_views=2,
                temperature=case.temperature,
                decoupled=False,
            )
            for start in range(0, len(rows), share)
        ]
        return torch.stack(losses).mean()

    def whole(rows: Tensor) -> Tensor:
        """Ranks in order, in a rank view by view: as one rank would have them, view by view."""
        views = rows.unflatten(0, (num_ranks, 2, -1)).transpose(0, 1).flatten(0, 2)
        return case.of(nt_xent_reference)(views, views)

    return errors(over_ranks, whole, everyone)


def queue_errors(dtype: torch.dtype) -> list[float]:
    queries, keys, queue = (Case(1, n, 1, 40, 1).embeddings().to(dtype) for n in (35, 35, 83))
    keys = keys.flip(0)
    way = partial(infonce._fused_queue_nce, tiles=SMALL, temperature=0.07)

    def reference(queries: Tensor) -> Tensor:
        logits = torch.cat([(queries * keys.double()).sum(1, keepdim=True), queries @ queue.double().T], 1) / 0.07
        return F.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.int64))

    return errors(lambda q: way(q, queue, keys=keys), reference, queries)


def indexed_errors(magnitude: float) -> list[float]:
    """Of embeddings beyond float16's range, either way, whose logits are ordinary numbers."""
    anchors, candidates = Case(1, 33, 1, 20, 1).embeddings() * magnitude, Case(1, 50, 1, 20, 1).embeddings()
    positives = torch.arange(33) * 7 % 50
    temperature = 0.1 * magnitude
    way = partial(infonce._fused_indexed_nce, tiles=SMALL, positives=positives, temperature=temperature)
    return errors(way, lambda a, c: F.cross_entropy(a @ c.T / temperature, positives), anchors, candidates)


def part_of_the_many(num_small: int) -> float:
    """The gradient that an anchor gets from many others, each of a weight too small for float16, over what it should."""
    others = torch.zeros(1 + num_small, 16)
    others[0, 0] = others[1:, 1] = 1
    anchor = others[:1].clone().requires_grad_()
    fused.log_sum_exp(anchor, others, scale=20.0, tiles=Tiles(16, 1024, 1)).sum().backward()
    assert anchor.grad is not None
    weight = torch.tensor(-20.0).double().exp()
    return float(anchor.grad[0, 1] / (20 * num_small * weight / (1 + num_small * weight)))


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which kernels run on the CPU: Triton decides at its import."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(torch.set_num_threads, 1).result()
            yield pool
    finally:
        os.environ.pop("TRITON_INTERPRET")
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 5, 3, 16, 0.1),
        Case(2, 17, 2, 128, 0.1),
        Case(2, 9, 1, 200, 0.5),
        Case(3, 7, 2, 20, 0.07),
        Case(2, 20, 2, 33, 0.1, decoupled=True),
        Case(3, 7, 3, 20, 0.07, decoupled=True),
    ],
    ids=str,
)
def test_nt_xent_is_as_exact_as_float32(interpreter: ProcessPoolExecutor, case: Case) -> None:
    """No size is a multiple of a tile's."""
    assert max(interpreter.submit(nt_xent_errors, case).result()) < 1e-6


@pytest.mark.parametrize("decoupled", [False, True])
def test_without_gradients_the_loss_is_the_same(interpreter: ProcessPoolExecutor, decoupled: bool) -> None:
    case = Case(2, 9, 2, 40, 0.1, decoupled=decoupled)
    assert interpreter.submit(no_gradient_error, case).result() < 1e-6


def test_a_tiny_temperature_makes_no_difference_but_the_roundings(interpreter: ProcessPoolExecutor) -> None:
    assert max(interpreter.submit(nt_xent_errors, Case(2, 9, 1, 100, 0.01)).result()) < 1e-5


@pytest.mark.parametrize("decoupled", [False, True])
def test_of_bfloat16_only_the_gradients_are_rounded(interpreter: ProcessPoolExecutor, decoupled: bool) -> None:
    case = Case(2, 9, 2, 40, 0.1, decoupled=decoupled, dtype=torch.bfloat16)
    loss, *gradients = interpreter.submit(nt_xent_errors, case).result()
    assert loss < 1e-6
    assert max(gradients) < torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_shares_of_ranks_give_the_loss_and_gradient_of_the_whole(
    interpreter: ProcessPoolExecutor, num_ranks: int
) -> None:
    assert max(interpreter.submit(shares_errors, num_ranks).result()) < 1e-6


def test_the_queues_loss_is_as_exact_as_float32(interpreter: ProcessPoolExecutor) -> None:
    assert max(interpreter.submit(queue_errors, torch.float32).result()) < 1e-6


@pytest.mark.parametrize("magnitude", [1.0, 1e6, 1e-6])
def test_the_indexed_loss_is_as_exact_as_float32_whatever_the_length(
    interpreter: ProcessPoolExecutor, magnitude: float
) -> None:
    assert max(interpreter.submit(indexed_errors, magnitude).result()) < 1e-6


def test_many_small_weights_are_not_lost(interpreter: ProcessPoolExecutor) -> None:
    """exp(-20) is 2e-9, float16's smallest number 6e-8."""
    assert interpreter.submit(part_of_the_many, 5000).result() == pytest.approx(1, rel=1e-3)


def compiled(
    kernel: Any, capability: int, size: int, tiles: Tiles, excluded: int, parts: int, *, needs_averages: bool = True
) -> Any:
    """The kernel as a GPU of that capability would run it; embeddings of `size`."""
    constants = {
        "EXCLUDED": excluded,
        "SIZE": size,
        "BLOCK_SIZE": size,
        "PARTS": parts,
        "ANCHORS": tiles.anchors,
        "OTHERS": tiles.others,
        "NEEDS_AVERAGES": needs_averages,
    }
    pointers = dict.fromkeys(("factor", "sums", "averages", "upstream", "gradients"), "*fp32")
    types = {**dict.fromkeys(constants, "constexpr"), **pointers, "anchors": "*fp16", "others": "*fp16"}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={name: value for name, value in constants.items() if name in signature},
        attrs=aligned,
    )
    options = {"num_warps": tiles.warps, "num_stages": STAGES}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


KERNELS = (kernels.log_sum_exp, kernels.gradient_of_others)
ALL_HAVE = 99 * 1024
"""Shared memory of a program, in bytes: on GPUs of consumers from sm_86 on. An A100 has 163 KiB, an H100 227."""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: str(kernel.__name__).rpartition(".")[2])
def test_all_that_is_launched_compiles_for_tensor_cores(
    kernel: Any, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    variants = itertools.cycle((excluded.value, parts) for parts in (2, 1) for excluded in EXCLUDED)
    of_sizes = [(size, tiles) for size in TILES for tiles in TILES[size]]
    for size, tiles in of_sizes:
        found = compiled(kernel, capability, size, tiles, *next(variants))
        assert "mma" in found.asm["ptx"]
    excluded, parts = next(variants)
    compiled(kernel, capability, 32, TILES[128][-1], excluded, parts)
    compiled(kernel, capability, 128, TILES[128][0], excluded, parts, needs_averages=False)
    for size in TILES:
        assert compiled(kernel, capability, size, TILES[size][-1], EXCLUDED[0].value, 2).metadata.shared <= ALL_HAVE


EXCLUDED = (kernels.NONE, kernels.ITSELF, kernels.SAMPLE)


def test_for_a_t4_they_would_use_no_tensor_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is why `LEAST_CAPABILITY` keeps them from it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in KERNELS:
        found = compiled(kernel, 75, 16, Tiles(16, 16, 4), kernels.ITSELF.value, 2)
        assert found.metadata.shared <= 64 * 1024
        assert "mma" not in found.asm["ptx"]


def test_on_a_cpu_nothing_is_measured() -> None:
    rows = F.normalize(torch.randn(1100, 4), dim=1)
    infonce.nt_xent(rows, rows, offset=0, num_views=2, temperature=0.1)
    assert len(rows) ** 2 > fused.MIN_PAIRS
    assert not fused._chosen


SLOW, FAST, WIDE = TILES[128]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({None: 3.0, SLOW: 4.0, FAST: 2.0, WIDE: 5.0}, FAST),
        ({None: 1.0, SLOW: 4.0, FAST: 2.0, WIDE: 5.0}, None),
        ({None: 3.0, SLOW: triton.OutOfResources(200, 100, "shared memory"), FAST: 2.0, WIDE: 5.0}, FAST),
    ],
)
def test_what_is_fastest_is_chosen_and_measured_once(
    times: dict[Tiles | None, Any], expected: Tiles | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = choose(times, monkeypatch)
    assert [measured(), measured()] == [expected, expected]


def test_where_a_kernel_does_not_run_blocks_do_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="the loss goes by blocks, its kernel does not run here: .*no compiler"):
        assert choose({None: 1.0, SLOW: RuntimeError("no compiler")}, monkeypatch)() is None


def test_running_out_of_memory_is_the_steps_as_always(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        choose({None: 1.0, SLOW: torch.OutOfMemoryError("full")}, monkeypatch)()


def choose(times: dict[Tiles | None, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[], Tiles | None]:
    """The choice where each way takes so long, once, or fails so."""

    def seconds(way: Callable[..., Tensor], *args: Any) -> float:
        time = times.pop(way.keywords["tiles"] if isinstance(way, partial) else None)
        if isinstance(time, Exception):
            raise time
        return float(time)

    def loss(anchors: Tensor, others: Tensor, /, *, tiles: Tiles | None = None) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(fused, "_seconds", seconds)
    monkeypatch.setattr(fused, "_chosen", {})
    rows = torch.zeros(2, 100)
    return partial(fused._choose, "the loss", loss, loss, rows, rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [128, 200])
def test_a_gpus_kernels_are_as_exact_and_make_nobody_wait(size: int) -> None:
    if torch.cuda.get_device_capability() < fused.LEAST_CAPABILITY:
        pytest.skip("blocks, by LEAST_CAPABILITY")
    case = Case(2, 500, 2, size, 0.1)
    everyone = case.embeddings().cuda()
    anchors = everyone[case.offset :]
    expected = with_gradients(case.of(nt_xent_reference), *(x.double().cpu() for x in (anchors, everyone)))
    ways = [
        case.of(partial(infonce._fused_nt_xent, tiles=TILES[128 if size <= 128 else 256][-1])),
        case.of(infonce.nt_xent),
    ]
    for way in ways:
        with_gradients(way, anchors, everyone)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = with_gradients(way, anchors, everyone)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert max(error(f.cpu(), e) for f, e in zip(found, expected, strict=True)) < 1e-5
    assert fused._chosen
