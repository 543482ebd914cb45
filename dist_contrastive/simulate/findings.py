"""What a simulated step has shown; JSON values throughout."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, order=True)
class Place:
    """A line of code that is neither torch's nor another library's."""

    file: str
    """Relative to the folder that holds the package, where it is below it."""
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}"


@dataclass(frozen=True)
class Operation:
    """All calls of one operation on the device."""

    name: str
    """torch's, as in `aten.convolution`."""
    count: int
    flops: int
    """A multiplication and an addition are two; 0 for operations that torch has no formula for."""


@dataclass(frozen=True)
class Collective:
    """All calls of one collective with as many bytes from one place."""

    kind: str
    """torch's name, as in `allreduce`."""
    count: int
    bytes: int
    """Of one call: its input or its output, whichever is larger. For a gather that is what all ranks have together."""
    where: Place
    caller: Place | None
    """The nearest line in another file that led to it."""
    is_message: bool
    """Whether it goes from host to host, for which no device waits."""


@dataclass(frozen=True)
class HostSync:
    """All calls from one place of something for which the host waits for the device."""

    what: str
    count: int
    where: Place
    caller: Place | None


@dataclass(frozen=True)
class WrongDevice:
    """A tensor that is on the host where the operation runs on the device."""

    what: str
    where: Place
    caller: Place | None


@dataclass(frozen=True)
class Simulation:
    """What one rank does in a step: counts of the third update, in which nothing is made for the first time."""

    ranks: int
    rank_batch: int
    """Samples of this rank."""
    micro: int
    """Samples of one forward pass."""
    precision: Precision
    parameters: int
    """How many numbers are trained."""
    model_bytes: int
    """Parameters and buffers, teachers and queues included."""
    embedding_bytes: int
    """What the method made of the rank batch: embeddings and targets."""
    held_bytes: int
    """Tensors on the device between updates: the model, the optimizer's state, buckets of gradients."""
    checkpoint_bytes: int
    """Tensors that a checkpoint holds: the model, and the optimizer's state of all ranks."""
    peak_bytes: int
    """Tensors on the device at the worst moment of three updates."""
    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    host_syncs: tuple[HostSync, ...]
    unlogged_syncs: tuple[HostSync, ...]
    """Those of the update before, which is not logged, and follows one whose numbers were waited for."""
    wrong_devices: tuple[WrongDevice, ...]

    @property
    def beyond_model_bytes(self) -> int:
        """The peak without parameters and buffers."""
        return self.peak_bytes - self.model_bytes

    @property
    def flops(self) -> int:
        return sum(operation.flops for operation in self.operations)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Simulation":
        def rows(kind: type, name: str) -> tuple[Any, ...]:
            return tuple(kind(**{key: _place(key, value) for key, value in row.items()}) for row in data[name])

        lists = {
            "operations": Operation,
            "collectives": Collective,
            "host_syncs": HostSync,
            "unlogged_syncs": HostSync,
            "wrong_devices": WrongDevice,
        }
        return cls(**{**data, **{name: rows(kind, name) for name, kind in lists.items()}})


def _place(key: str, value: Any) -> Any:
    return Place(**value) if key in ("where", "caller") and value is not None else value
