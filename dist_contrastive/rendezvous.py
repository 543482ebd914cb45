"""How the ranks of a launch find one another, with a bound and with names; and what they tell of themselves when they do.

A launcher gives each rank a number, an address and a port (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). There is a store:
the launcher's (torchrun, accelerate launch on several ranks) or rank 0's own. Through it rank 0 calls the roll: it makes up a
token, each rank answers to that with what it is, and rank 0 gives the whole list back. Only then the process group is made, in
a part of the store that the token names: what an earlier attempt of the same launcher left in the store, which it keeps
when it restarts its ranks, is never read.
"""

import itertools
import json
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from dist_contrastive import processes
from dist_contrastive.config import UserError, require

CONNECT_S = 600.0
"""The longest wait for a rank to come; --launch.timeout-minutes may make it shorter."""
POLL_S = 0.2
FAREWELL_S = 3.0
"""How long rank 0 keeps the store that the others read from after it has told them that some are missing."""


@dataclass(frozen=True)
class Peer:
    """What a rank tells of itself."""

    host: str
    machine: str
    """As `processes.machine` says; equal for ranks that share cores."""
    cpus: str
    """The processors that it may run on, as in `0-3,8`."""
    gpu: str
    """What tells its GPU from all others; empty on the CPU."""


_peers: list[Peer] = []


def peers() -> list[Peer]:
    """What each rank has told, in rank order; of this process alone where no ranks have been connected."""
    return _peers or [_this_process("")]


def fair_cores() -> int:
    """How many cores this process may keep busy: its own, and of those that others may run on, too, an equal part; at least 1."""
    mine = _this_process("")
    return share_of_cores(mine.cpus, [peer.cpus for peer in peers() if peer.machine == mine.machine])


def share_of_cores(mine: str, everyones: list[str]) -> int:
    """As `fair_cores`, of the processors `mine`; `everyones` are those of all processes of this machine, this one included."""
    users = Counter(itertools.chain.from_iterable(map(numbers, everyones)))
    share = sum(1 / max(1, users[cpu]) for cpu in numbers(mine))
    return max(1, int(share + 1e-6))  # thirds add up to a little less than 1


def join(backend: str, *, timeout: timedelta, gpu: Callable[[], str]) -> None:
    """Connect this rank with the others of its launch, if there are others; where they are connected, only call the roll.

    Args:
        backend: of the process group, `gloo` or `nccl`.
        timeout: of the group's collectives.
        gpu: gives this rank's `Peer.gpu`.

    `UserError` where the launcher's variables are not complete, the port is taken, or ranks do not come in time.
    """
    global _peers
    _peers = []
    connected = dist.is_initialized()
    world = dist.get_world_size() if connected else int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return
    patience_s = min(timeout.total_seconds(), CONNECT_S)
    if connected:
        store: dist.Store = dist.PrefixStore("roll call", dist.distributed_c10d._get_default_store())
        rank = dist.get_rank()
    else:
        rank = int(_launchers("RANK"))
        store = _open_store(rank, timeout, patience_s)
    call = _RollCall(store, rank, world, patience_s)
    call.answer(_this_process(gpu()))
    _peers = call.peers
    if not connected:
        part = dist.PrefixStore(call.token, store)
        part.set_timeout(timeout)
        dist.init_process_group(backend, store=part, rank=rank, world_size=world, timeout=timeout)


def numbers(ranges: str) -> set[int]:
    """The inverse of `in_ranges`."""
    bounds = [part.partition("-") for part in ranges.split(",") if part]
    return {number for first, _, last in bounds for number in range(int(first), int(last or first) + 1)}


def in_ranges(found: Iterable[int]) -> str:
    """Whole numbers as in `0-3,8`."""
    parts = []
    for _, group in itertools.groupby(enumerate(sorted(found)), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)


def _this_process(gpu: str) -> Peer:
    return Peer(socket.gethostname(), processes.machine(), in_ranges(os.sched_getaffinity(0)), gpu)


def _launchers(name: str) -> str:
    """A variable of the environment that a launcher sets."""
    value = os.environ.get(name, "")
    require(
        bool(value),
        f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, and {name} is not set; start ranks with accelerate launch or torchrun",
    )
    return value


def _open_store(rank: int, timeout: timedelta, patience_s: float) -> dist.Store:
    """The store that the launcher's variables name; rank 0 opens it where the launcher has none."""
    host, told = _launchers("MASTER_ADDR"), _launchers("MASTER_PORT")
    port = int(told) if told.isdecimal() else 0
    require(
        0 < port < 2**16,
        f"MASTER_PORT {told}: all ranks need to know the same port; give one from 1 to 65535 (accelerate launch on several "
        "machines: --main_process_port)",
    )
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _wait_for_port(host, port, patience_s)
    try:
        return dist.TCPStore(host, port, is_master=serves, timeout=timeout, wait_for_workers=False)
    except dist.DistNetworkError as error:
        if serves and "EADDRINUSE" in str(error):
            raise UserError(
                f"port {port} (MASTER_PORT) of {host} is taken, perhaps by another run; give another one to all ranks"
            ) from error
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{host}:{port} (MASTER_ADDR, MASTER_PORT) can't be used for the ranks to meet ({reason})"
        ) from error


def _wait_for_port(host: str, port: int, patience_s: float) -> None:
    """Return once somebody listens."""
    until = time.monotonic() + patience_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=5.0):
                return
        except OSError as error:
            reason = error.strerror or error
            if time.monotonic() >= until:
                raise UserError(
                    f"rank 0 has not come within {_minutes(patience_s)}: nothing answers at {host}:{port} ({reason}); "
                    "see whether it was started, and whether MASTER_ADDR and MASTER_PORT are its host's and open to this one"
                ) from error
        time.sleep(POLL_S)


class _RollCall:
    """One call of the roll, on this rank.

    Attributes:
        token: what rank 0 made up for it.
        peers: what each rank has told, once the call is over.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, patience_s: float) -> None:
        self.token = ""
        self.peers: list[Peer] = []
        self._store = store
        self._rank = rank
        self._world = world
        self._patience_s = patience_s
        self._until = time.monotonic() + patience_s

    def answer(self, me: Peer) -> None:
        """Tell the others; return when all have told."""
        mine = json.dumps({"id": uuid.uuid4().hex, **vars(me)})
        try:
            everyone = self._call(mine) if self._rank == 0 else self._wait(mine)
        except dist.DistNetworkError as error:
            raise UserError(
                "rank 0, or the launcher, ended while the ranks were connecting; its error tells why"
            ) from error
        self.peers = [Peer(**{name: value for name, value in one.items() if name != "id"}) for one in everyone]

    def _call(self, mine: str) -> list[dict[str, str]]:
        self.token = uuid.uuid4().hex
        self._store.set("token", self.token)
        self._store.set(self._key(0), mine)
        keys = [self._key(rank) for rank in range(self._world)]
        while not self._store.check(keys):
            if time.monotonic() > self._until:
                self._give_up(keys)
            time.sleep(POLL_S)
        answers = self._store.multi_get(keys)
        everyone: list[dict[str, str]] = [json.loads(answer) for answer in answers]
        self._store.set(f"{self.token}/all", json.dumps(everyone))
        return everyone

    def _give_up(self, keys: list[str]) -> NoReturn:
        """Name the ranks that are missing, on all that are not."""
        here = [rank for rank, key in enumerate(keys) if self._store.check([key])]
        hosts: dict[str, list[int]] = {}
        for rank in here:
            hosts.setdefault(json.loads(self._store.get(keys[rank]))["host"], []).append(rank)
        missing = in_ranges(set(range(self._world)).difference(here))
        come = "; ".join(f"{in_ranges(ranks)} on {host}" for host, ranks in hosts.items())
        text = (
            f"rank(s) {missing} of {self._world} did not come within {_minutes(self._patience_s)} (here: {come}); see whether "
            "they were started, and what ended them"
        )
        self._store.set(f"{self.token}/all", json.dumps(text))
        time.sleep(FAREWELL_S)
        raise UserError(text)

    def _wait(self, mine: str) -> list[dict[str, str]]:
        reason = f"rank 0 has not called within {_minutes(self._patience_s)}; see whether it was started"
        # Rank 0 may give up at its own time, and says who is missing then.
        while time.monotonic() < self._until + FAREWELL_S:
            time.sleep(POLL_S)
            if not self._store.check(["token"]):
                continue
            # As long as rank 0 has not called this may be an earlier attempt's, with answers and a list of that time.
            self.token = self._store.get("token").decode()
            answered = self._store.compare_set(self._key(self._rank), "", mine).decode()
            if self._store.check([f"{self.token}/all"]):
                everyone = json.loads(self._store.get(f"{self.token}/all"))
                if isinstance(everyone, str):
                    raise UserError(everyone)
                if mine in map(json.dumps, everyone):
                    found: list[dict[str, str]] = everyone
                    return found
            if answered != mine:
                other = json.loads(answered)["host"]
                reason = f"rank {self._rank} is there already, on {other}: two launches use one MASTER_PORT; give each its own"
        raise UserError(reason)

    def _key(self, rank: int) -> str:
        return f"{self.token}/{rank}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.3g} min"
