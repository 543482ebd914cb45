"""What running out of memory looks like: only torch's own allocators have an exception of their own for it."""

import errno
import re

import torch

MAX_TEXT = 240
"""Characters of an error's text that are quoted."""

# Of allocators and drivers (torch's, CUDA's, C++'s, the system's), of libraries that say which call failed to allocate
# (cuBLAS, cuDNN, cuSOLVER, cuFFT, cuSPARSE, NCCL), and of those that say no more than that they had no memory.
_CERTAIN = re.compile(
    r"out of memory|out_of_memory|not enough memory|can(?:'t|not) allocate memory|bad_alloc|bad allocation"
    r"|alloc(?:ation)?_failed|memoryallocation|failed to (?:cuda|hip) (?:host )?[mc]alloc"
    r"|could not create a memory (?:object|storage)|unable to (?:allocate|mmap) [\d.]+ ?[kmgt]?i?b"
    r"|failed to allocate (?:[\d.]+ ?[kmgt]?i?b|memory|workspace)",
    re.IGNORECASE,
)
# A library that had no memory for its workspace or its handle may say this. So may one that can't do what it was asked.
_SUSPECTED = re.compile(
    r"unable to find an engine|no valid execution plans|could not create a primitive|unhandled cuda error"
    r"|CUDNN_STATUS_(?:INTERNAL_ERROR|NOT_INITIALIZED|EXECUTION_FAILED|NOT_SUPPORTED)"
    r"|CUBLAS_STATUS_(?:NOT_INITIALIZED|INTERNAL_ERROR)|CUSOLVER_STATUS_(?:NOT_INITIALIZED|INTERNAL_ERROR)"
    r"|CUSPARSE_STATUS_INSUFFICIENT_RESOURCES|CUFFT_INTERNAL_ERROR",
    re.IGNORECASE,
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the machine had no memory for what was asked, on a GPU or on the CPU, or an error that often means that.

    What is only suspected is worth a trial with less, as long as the original text is kept: see `quote`.
    """
    return _is_certain(error) or (isinstance(error, RuntimeError) and bool(_SUSPECTED.search(str(error))))


def quote(error: Exception) -> str:
    """One line with the original text, and with the doubt where the error may mean something else as well."""
    text = " ".join(str(error).split())[:MAX_TEXT] or type(error).__name__
    return text if _is_certain(error) else f"{text}; often a lack of memory, but it may be another fault"


def _is_certain(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_CERTAIN.search(str(error)))
