"""SyncBatchNorm: at any number of ranks what BatchNorm is at one rank with all samples."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dist_contrastive.config import EncoderConfig
from dist_contrastive.distributed import rank, world_size
from dist_contrastive.models.encoders import build_encoder
from dist_contrastive.models.sync_norm import SyncBatchNorm, _Normalize, message_size
from tests.harness import run_ranks

CHANNELS = 3
SHARES = {1: [7], 2: [3, 4], 4: [2, 0, 1, 4]}
STEPS = 3


def images(*shape: int) -> Tensor:
    """Channels of different mean and spread."""
    x = torch.randn(7, CHANNELS, *shape, generator=torch.Generator().manual_seed(0))
    ones = [1] * len(shape)
    return x * torch.tensor([0.1, 1.0, 5.0]).view(1, -1, *ones) + torch.tensor([3.0, 0.0, -4.0]).view(1, -1, *ones)


def train(norm: nn.Module, shape: tuple[int, ...], part: slice, channels_last: bool) -> dict[str, np.ndarray]:
    """A few passes over this part of the samples, whose loss weighs each output; what comes of them."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.linspace(0.5, 2, CHANNELS))
    weights = torch.randn(7, CHANNELS, *shape, generator=torch.Generator().manual_seed(1))
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        x = (images(*shape) + step)[part]
        x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
        norm.zero_grad()
        output = norm(x)
        (output.square() * weights[part]).sum().backward()
        assert x.grad is not None
        found = {"output": output.detach(), "input": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in norm.named_parameters() if p.grad is not None}
    found |= dict(norm.named_buffers())
    return {name: value.numpy().copy() for name, value in found.items()}


def my_part() -> slice:
    sizes = SHARES[world_size()]
    return slice(sum(sizes[: rank()]), sum(sizes[: rank() + 1]))


def train_share(
    _: int, shape: tuple[int, ...], channels_last: bool, options: dict[str, object]
) -> dict[str, np.ndarray]:
    return train(SyncBatchNorm(CHANNELS, **options), shape, my_part(), channels_last)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("shape", "channels_last", "options"),
    [
        ((), False, {}),
        ((6,), False, {}),
        ((4, 5), False, {}),
        ((4, 5), True, {}),
        ((4, 5), False, {"affine": False}),
        ((4, 5), False, {"momentum": None}),
        ((4, 5), False, {"track_running_stats": False}),
        ((4, 5), False, {"eps": 0.5, "momentum": 0.3}),
    ],
)
def test_ranks_together_are_batch_norm_of_all_samples(
    num_ranks: int, shape: tuple[int, ...], channels_last: bool, options: dict[str, object]
) -> None:
    kind: Callable[..., nn.Module] = nn.BatchNorm2d if len(shape) == 2 else nn.BatchNorm1d
    expected = train(kind(CHANNELS, **options), shape, slice(0, 7), channels_last)
    shares = run_ranks(train_share, num_ranks, shape, channels_last, options)
    found = {name: np.concatenate([share[name] for share in shares]) for name in ("output", "input")}
    for name in expected.keys() - found.keys():
        if name.startswith("gradient of"):
            found[name] = sum(share[name] for share in shares)
        else:
            found[name] = shares[0][name]
            assert all(np.array_equal(share[name], shares[0][name]) for share in shares), name
    assert all(share.keys() == expected.keys() for share in shares)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5 * np.abs(value).max(), err_msg=name)


def far_from_zero(_: int) -> tuple[np.ndarray, np.ndarray]:
    """Values whose mean is a thousand times their deviation."""
    norm = SyncBatchNorm(CHANNELS, eps=0.0, momentum=1.0)
    output = norm((1000 + images(4, 5) / 5)[my_part()])
    assert norm.running_var is not None
    return output.detach().numpy(), norm.running_var.numpy()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_small_variance_beside_a_large_mean_is_not_lost_in_rounding(num_ranks: int) -> None:
    values = (1000 + images(4, 5) / 5).double()
    rows = values.transpose(0, 1).flatten(1)
    centred = values - rows.mean(1).view(1, -1, 1, 1)
    normalized = centred / rows.std(1, correction=0).view(1, -1, 1, 1)
    shares = run_ranks(far_from_zero, num_ranks)
    # Neighbours of 1000 in float32 are 6e-5 apart, and the first channel deviates by 0.02.
    output = np.concatenate([share[0] for share in shares])
    np.testing.assert_allclose(output, normalized, atol=1e-3)
    np.testing.assert_allclose(shares[0][1], rows.var(1), rtol=1e-3)


def test_in_evaluation_it_is_batch_norm_and_leaves_its_statistics() -> None:
    mine, batch_norm = SyncBatchNorm(CHANNELS), nn.BatchNorm2d(CHANNELS)
    x = images(4, 5)
    mine(x)
    batch_norm.load_state_dict(mine.state_dict())
    torch.testing.assert_close(mine.eval()(x), batch_norm.eval()(x))
    assert mine.num_batches_tracked == 1


def test_bf16_is_normalized_with_float32_statistics() -> None:
    x = images(8, 8).bfloat16()
    norm = SyncBatchNorm(CHANNELS, eps=0.0)
    output = norm(x.requires_grad_())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float().mean((0, 2, 3)), torch.zeros(CHANNELS), atol=2e-3, rtol=0)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.detach().float().mean((0, 2, 3)))
    output.square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert norm.weight.grad.dtype == torch.float32  # type: ignore[union-attr]


def one_value(_: int) -> str:
    try:
        SyncBatchNorm(CHANNELS)(torch.ones(1, CHANNELS))
    except ValueError as error:
        return str(error)
    return ""


def test_one_value_per_channel_has_no_variance_but_two_ranks_have_two() -> None:
    assert run_ranks(one_value, 1) == ["batch statistics need more than one value per channel, got [1, 3]"]
    assert run_ranks(one_value, 2) == ["", ""]
    with pytest.raises(ValueError, match=r"expected \[N, C, ...\], got 1 axes"):
        SyncBatchNorm(CHANNELS)(torch.ones(3))


@pytest.mark.parametrize("name", ["resnet10_w16", "mobilenetv3_small_050"])
def test_an_encoder_with_it_is_the_same_function(name: str) -> None:
    batches = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    batch = build_encoder(EncoderConfig(name=name), 32)
    torch.manual_seed(0)
    sync = build_encoder(EncoderConfig(name=name, norm="sync"), 32)
    assert not any(type(m).__name__.startswith("BatchNorm") for m in sync.modules())
    assert batch.state_dict().keys() == sync.state_dict().keys()
    torch.testing.assert_close(sync(batches), batch(batches), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sync.eval()(batches), batch.eval()(batches), rtol=1e-4, atol=1e-4)


def test_how_large_its_messages_are() -> None:
    assert message_size(nn.Sequential(SyncBatchNorm(4), nn.BatchNorm2d(9), SyncBatchNorm(7))) == 15
    assert message_size(nn.BatchNorm2d(9)) == 0


class Kernels(TorchDispatchMode):
    """Stands where a GPU's kernels would run: checks what they are given and gives tensors of what they return.

    What is checked is what ATen's native/cuda/Normalization.cuh asks for. `called` has their names, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "batch_norm" not in name:
            return func(*args, **(kwargs or {}))
        self.called.append(name)
        values = [t for t in args if isinstance(t, Tensor) and t.ndim > 1]
        vectors = [t for t in args if isinstance(t, Tensor) and t.ndim == 1]
        x = values[0]
        assert all(t.device.type == "cuda" for t in values + vectors)
        assert all((t.shape, t.dtype, t.stride()) == (x.shape, x.dtype, x.stride()) for t in values)
        assert x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
        if name == "batch_norm_backward_elemt":
            count = vectors.pop()
            assert count.dtype == torch.int32, "it is read through a pointer to int"
        assert all((t.shape, t.dtype) == ((CHANNELS,), statistics) and t.is_contiguous() for t in vectors)
        vector = torch.empty(CHANNELS, dtype=statistics, device="cuda")
        if name == "batch_norm_update_stats":
            return vector, vector.clone()
        if name == "batch_norm_backward_reduce":
            assert args[4] is None, "without a weight it makes no gradient of one"
            assert args[5:] == (True, False, False)
            return vector, vector.clone(), vector[:0], vector[:0]
        assert name in ("batch_norm_elemt", "batch_norm_backward_elemt"), f"a GPU has no {name} that fits here"
        return torch.empty_like(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "channels_last"), [((), False), ((6,), False), ((4, 5), False), ((4, 5), True), ((0, 5), False)]
)
@pytest.mark.parametrize("affine", [True, False])
def test_a_gpus_kernels_get_what_they_ask_for(
    affine: bool, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype
) -> None:
    parameters = torch.float64 if dtype == torch.float64 else torch.float32  # as under autocast
    with FakeTensorMode(), Kernels() as kernels:
        norm = SyncBatchNorm(CHANNELS, affine=affine, device="cuda", dtype=parameters)
        x = torch.empty(7, CHANNELS, *shape, dtype=dtype, device="cuda")
        x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
        if 0 in shape:
            # Not a value on this rank: no kernel runs, but the shapes are those that autograd asks for.
            expected: list[list[str]] = [[], []]
        else:
            expected = [
                ["batch_norm_update_stats", "batch_norm_elemt"],
                ["batch_norm_backward_reduce", "batch_norm_backward_elemt"],
            ]
        found, mean, var, count = _Normalize.apply(x, norm.weight, norm.bias, norm.eps)
        assert kernels.called == expected[0]
        assert (found.shape, found.dtype, found.stride()) == (x.shape, dtype, x.stride())
        assert mean.dtype == var.dtype == count.dtype == parameters
        # The engine asks for CUDA streams, which are not here: its one step is made by hand.
        d, of_weight, of_bias, _ = found.grad_fn.apply(torch.empty_like(found), None, None, None)
        assert kernels.called == expected[0] + expected[1]
        assert (d.shape, d.dtype, d.stride()) == (x.shape, dtype, x.stride())
        for gradient in (of_weight, of_bias):
            assert (gradient is None) is not affine
            assert gradient is None or (gradient.shape, gradient.dtype) == ((CHANNELS,), parameters)


def test_a_gpus_kernels_get_gradients_that_lie_otherwise_than_the_input() -> None:
    """A gradient that was expanded (of a mean over pixels, say) has strides of zero."""
    with FakeTensorMode(), Kernels() as kernels:
        x = torch.empty(7, CHANNELS, 4, 5, device="cuda", requires_grad=True)
        output = _Normalize.apply(x, None, None, 1e-5)[0]
        d = output.grad_fn.apply(
            torch.empty(7, CHANNELS, 1, 1, device="cuda").expand(7, CHANNELS, 4, 5), None, None, None
        )
        assert d[0].shape == x.shape
        assert kernels.called[-1] == "batch_norm_backward_elemt"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(), (6,), (4, 5)])
def test_a_gpus_kernels_are_the_function_of_the_cpus(shape: tuple[int, ...]) -> None:
    outcomes = []
    for device in ("cuda", "cpu"):
        norm = SyncBatchNorm(CHANNELS, affine=False).to(device)
        x = images(*shape).to(device).requires_grad_()
        output = norm(x)
        (output.square() * torch.arange(output.numel(), device=device).view(output.shape)).sum().backward()
        assert x.grad is not None
        outcomes.append([t.cpu() for t in (output.detach(), x.grad, *norm.buffers())])
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
def test_on_a_gpu_it_is_batch_norm(affine: bool, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    outcomes = []
    for kind in (SyncBatchNorm, nn.BatchNorm2d):
        norm = kind(CHANNELS, affine=affine).cuda()
        x = images(4, 5).cuda().to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        output = norm(x)
        (output.float().square() * torch.linspace(-1, 1, 20, device="cuda").view(4, 5)).sum().backward()
        assert x.grad is not None
        outcomes.append([output, x.grad, *[p.grad for p in norm.parameters()], *norm.buffers()])
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
