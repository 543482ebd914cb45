"""The augmentation's Triton kernels: they compute what the CPU's code does, and they compile for the GPUs that are meant."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import permutations
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dist_contrastive.data.augment import cuda
from dist_contrastive.data.augment.cpu import augment_on_cpu
from dist_contrastive.data.augment.draws import BRIGHTNESS, CONTRAST, HUE, NEVER, NUM_DRAWS, NUM_TURNS, SATURATION, Draw

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHARED_BYTES = 64 * 1024
"""What a program may use on the GPU that has least, a T4."""


def every_order(num: int, generator: torch.Generator) -> Tensor:
    """Draws of `num` images, float32 [num, NUM_DRAWS], in which all operations happen in all orders, and to the last nothing."""
    draws = torch.zeros(num, NUM_DRAWS)
    draws[:, Draw.BLEND : Draw.BLEND + 3 * NUM_TURNS : 3] = 1
    draws[:, Draw.HUE_TURN] = -1
    draws[:, Draw.THRESHOLD] = NEVER
    orders = list(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
    for i, draw in enumerate(draws[:-1]):
        for turn, operation in enumerate(orders[5 * i % len(orders)]):
            strength = torch.rand((), generator=generator)
            if operation == HUE:
                draw[Draw.HUE_TURN], draw[Draw.HUE] = turn, strength - 0.5
                continue
            own, of_luma, of_mean = range(Draw.BLEND + 3 * turn, Draw.BLEND + 3 * turn + 3)
            draw[own] = 2 * strength
            if operation != BRIGHTNESS:
                draw[of_luma if operation == SATURATION else of_mean] = 1 - 2 * strength
        draw[Draw.FLIP] = i % 2
        draw[Draw.GRAYSCALE] = i % 5 == 4
        draw[Draw.SIGMA] = (0.5, 0, 2, 0.1)[i % 4]
        draw[Draw.THRESHOLD] = (
            0.5 if i % 3 else NEVER
        )  # at a half a value and its inverse meet, and rounding makes no jump
    return draws


def check(side: int, num: int, dtype: torch.dtype, rounding: float, augment: Callable[..., Tensor]) -> None:
    """That `augment` gives the CPU's result, where `rounding` is that of a value of 2 to 4 in `dtype`."""
    generator = torch.Generator().manual_seed(side)
    images = torch.randint(0, 256, (num, side, side, 3), generator=generator, dtype=torch.uint8)
    images[1] = images[1, ..., :1]
    images[2], images[3] = 0, 255
    draws = every_order(num, generator)
    expected = augment_on_cpu(images, draws, MEAN, STD)
    found = augment(images, draws, MEAN, STD, dtype)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    # Pictures that are being blurred are rounded twice to float16, by at most 2**-12, and the blur leaves out 2**-14.
    scratch = 0.0 if dtype == torch.float32 else (2 * 2**-12 + 2**-14) / min(STD)
    torch.testing.assert_close(found.float().cpu(), expected, atol=rounding + scratch, rtol=0)


# With Triton's interpreter


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which kernels are interpreted, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(torch.set_num_threads, 1).result()
            yield pool


def in_groups(images: Tensor, draws: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Groups of 5 images at most, and one smaller one."""
    return cuda.augment_in_groups(images, draws, mean, std, dtype, max_group=5)


# The interpreter cuts off what is rounded elsewhere when it converts to bfloat16.
ROUNDINGS = {torch.float32: 1e-4, torch.float16: 2**-10, torch.bfloat16: 2**-6}


@pytest.mark.parametrize(
    ("side", "num", "dtype"),
    [
        (1, 25, torch.float32),  # a single pixel
        (2, 25, torch.float32),
        (17, 25, torch.float32),
        (32, 25, torch.float32),
        (32, 25, torch.float16),
        (32, 25, torch.bfloat16),
        (40, 9, torch.float32),  # several tiles
        (40, 9, torch.float16),
        (100, 4, torch.float32),  # several blocks, whose sums come first, and a blur that ends before its radius
    ],
)
def test_kernels_compute_what_the_cpu_does(
    interpreter: ProcessPoolExecutor, side: int, num: int, dtype: torch.dtype
) -> None:
    interpreter.submit(check, side, num, dtype, ROUNDINGS[dtype], in_groups).result()


def is_the_same_alone(side: int) -> bool:
    images = torch.randint(0, 256, (3, side, side, 3), generator=torch.Generator().manual_seed(side), dtype=torch.uint8)
    draws = every_order(len(images), torch.Generator().manual_seed(side))
    alone, together = (
        cuda.augment_in_groups(images, draws, MEAN, STD, torch.float32, max_group) for max_group in (1, 3)
    )
    return torch.equal(alone, together)


@pytest.mark.parametrize("side", [17, 70])
def test_an_image_does_not_depend_on_its_group(interpreter: ProcessPoolExecutor, side: int) -> None:
    assert interpreter.submit(is_the_same_alone, side).result()


def shape_of_nothing() -> tuple[int, ...]:
    images, draws = torch.empty((0, 8, 8, 3), dtype=torch.uint8), torch.empty(0, NUM_DRAWS)
    return tuple(cuda.augment_in_groups(images, draws, MEAN, STD, torch.float16, 5).shape)


def test_no_images_become_no_images(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(shape_of_nothing).result() == (0, 3, 8, 8)


# Ahead of time

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Recorder:
    """Stands in for a kernel where there is no GPU, and keeps what it would be launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self._launches.append((self._kernel, args, options))


def type_of(argument: Any) -> str:
    if isinstance(argument, Tensor):
        names = {torch.uint8: "u8", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
        return "*" + names[argument.dtype]
    return {int: "i32", float: "fp32"}[type(argument)]


@pytest.mark.parametrize("capability", [75, 80, 90])
def test_what_is_launched_compiles_and_fits(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    launches: list[Launch] = []
    for name in ("sum_luma", "color", "blur"):
        monkeypatch.setattr(cuda, name, Recorder(getattr(cuda, name), launches))
    for side in (32, 224):
        for dtype in DTYPES if side == 32 else DTYPES[:2]:
            images = torch.zeros((1, side, side, 3), dtype=torch.uint8)
            cuda.augment_in_groups(images, torch.zeros(1, NUM_DRAWS), MEAN, STD, dtype, 1)
    assert len(launches) == 3 * 3 + 2 * 4
    for kernel, args, options in launches:
        signature, constants, aligned = {}, {}, {}
        for i, (parameter, argument) in enumerate(zip(kernel.params, args, strict=True)):
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", argument
            else:
                signature[parameter.name] = type_of(argument)
                if isinstance(argument, Tensor):
                    aligned[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_BYTES


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [1, 17, 32, 96, 224])
def test_a_gpu_computes_what_the_cpu_does_and_the_host_waits_for_nothing(side: int, dtype: torch.dtype) -> None:
    def augment(images: Tensor, draws: Tensor, *others: Any) -> Tensor:
        moved = images.cuda(), draws.cuda()
        cuda.augment_on_cuda(*moved, *others)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            return cuda.augment_on_cuda(*moved, *others)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    check(side, 49, dtype, {**ROUNDINGS, torch.bfloat16: 2**-7}[dtype], augment)
