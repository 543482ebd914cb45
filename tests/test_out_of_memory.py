"""Every face that a lack of memory is known to have is recognised, and what merely resembles it keeps its own text."""

import errno

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dist_contrastive.out_of_memory import is_out_of_memory, quote

# As users' reports and the libraries' sources have them, shortened in the middle.
CERTAIN = [
    # c10/cuda/CUDACachingAllocator.cpp
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.58 GiB of which 1.10 GiB is free."
    ),
    # the driver's own, through C10_CUDA_CHECK: pinned memory, a new context, a stream, a graph
    torch.AcceleratorError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    # aten/src/ATen/cuda/Exceptions.h, CUDABlas.cpp, CUDASparse, cusolver
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError(
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`. If you keep seeing this error, "
        "you may use `torch.backends.cuda.preferred_linalg_library()` to try linear algebra operators with other backends."
    ),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    # torch/csrc/distributed/c10d/NCCLUtils.hpp with NCCL's last error
    dist.DistBackendError(
        "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1970, unhandled cuda error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.20.5\nncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\nFailed to CUDA calloc async 608 bytes"
    ),
    dist.DistBackendError(
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    RuntimeError("Last error:\nFailed to CUDA malloc 4194304 bytes"),
    # c10/core/impl/alloc_cpu.cpp, on Linux and on Windows
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "1073741824 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:72] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8589934592 bytes."
    ),
    RuntimeError("std::bad_alloc"),
    RuntimeError("unable to mmap 1024 bytes from file </torch_1>: Cannot allocate memory (12)"),
    # oneDNN
    RuntimeError("could not create a memory object"),
    RuntimeError("could not create a memory storage object"),
    # Python, numpy, the system
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((2**20, 2**20), np.dtype(np.float32)),  # type: ignore[attr-defined]
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]

# cuDNN's heuristics try each engine and forget why the last one failed (aten/src/ATen/native/cudnn/Conv_v8.cpp); a handle
# that could not be made for want of memory is "not initialized".
SUSPECTED = [
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("Unable to find an engine to execute this computation"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("could not create a primitive"),
    dist.DistBackendError(
        "NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.20.5"
    ),
]

OTHER = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:34567"),
    dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
    ValueError("can't allocate memory"),
    KeyError("out of memory"),
    OSError(errno.ENOSPC, "No space left on device"),
]


@pytest.mark.parametrize("error", CERTAIN, ids=str)
def test_faces_of_a_lack_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert "may be another fault" not in quote(error)


@pytest.mark.parametrize("error", SUSPECTED, ids=str)
def test_what_may_be_a_lack_of_memory_is_tried_with_less_and_quoted_with_the_doubt(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert quote(error) == f"{error}; often a lack of memory, but it may be another fault"


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_other_errors(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_a_quotation_is_one_line_of_bounded_length() -> None:
    assert quote(MemoryError()) == "MemoryError"
    assert quote(RuntimeError("CUDA error:\n  out of memory")) == "CUDA error: out of memory"
    assert len(quote(torch.OutOfMemoryError("CUDA out of memory " * 100))) <= 240


def test_what_this_machines_allocators_say() -> None:
    for ask in (lambda: torch.empty(2**60), lambda: np.empty(2**57), lambda: bytearray(2**62)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            ask()
        assert is_out_of_memory(caught.value), caught.value


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_a_gpus_allocator_says() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, device="cuda")
    assert is_out_of_memory(caught.value)
