"""Replacing names of libraries for a while; says so where a library no longer has the name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def attribute(owner: Any, name: str) -> Any:
    """`owner.name`, a name that torch does not promise to keep."""
    if not hasattr(owner, name):
        raise RuntimeError(
            f"the simulation needs {getattr(owner, '__name__', owner)}.{name}, which torch {torch.__version__} does not have; "
            "it was written for the version in constraints.txt"
        )
    return getattr(owner, name)


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the context `owner.name` is `value`, in the whole process."""
    attribute(owner, name)
    # As it is stored, not as it is read: a class method is bound when it is read.
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
