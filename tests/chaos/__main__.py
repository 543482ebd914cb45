"""Faults at random over real runs of two ranks, for as long as one likes; how each run must end is known beforehand.

A run trains a fixed number of steps. Before it is done it is hurt one to four times: by a fault within a rank, by a signal, by
what happens to its files. After each fault all processes must be gone within a bound, what was said must hold what belongs to
the fault, and the same command is given again, until the run is done. Then its state must be that of a run which nothing
happened to, bit for bit.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from dist_contrastive.checkpoint import Checkpoint, CheckpointStore
from dist_contrastive.metrics import read_metrics
from tests.betons import jpeg, picture, write_beton
from tests.chaos.rank import FAULTS

ROOT = Path(__file__).parents[2]
LAUNCH_CONFIG = ROOT / "launch_configs" / "cpu.yaml"
STEPS, EVERY_STEPS = 60, 7
LAUNCH_S, END_S = 240.0, 120.0
"""Within which a launch comes to its first step, and a run ends after a fault: bounds for a machine that is busy."""
ONE_ROUNDING = 1e-4
"""By how much weights may differ where a fault changes the micro-batch, and so the order in which numbers are added."""


class Diverged(Exception):
    """A run did not end as it must."""


@dataclass
class Run:
    """A folder, and the launch that is under way in it."""

    dataset: Path
    folder: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    fault: str = ""
    """What a rank of this launch does to itself."""
    said: int = 0
    """Bytes of the log before this launch."""

    def launch(self, fault: str = "") -> None:
        arguments = [
            "photos", "--data.path", str(self.dataset), "--run-dir", str(self.folder), "--batch.global", "16",
            "--epochs", str(STEPS // 6), "--data.image-size", "16", "--encoder.norm", "group", "--log-every", "1",
            "--launch.device", "cpu", "--launch.timeout-minutes", "0.3", "--probe.no-enabled",
            "--checkpoint.every-steps", str(EVERY_STEPS),
        ]  # fmt: skip
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH_CONFIG)]
        self.fault = fault
        self.said = self.log.stat().st_size if self.log.exists() else 0
        environment = {**os.environ, "CHAOS": fault, "PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                [*command, "-m", "tests.chaos.rank", *arguments], stdout=file, stderr=file, env=environment, cwd=ROOT
            )

    def text(self) -> str:
        return self.log.read_bytes()[self.said :].decode(errors="replace")

    def step(self) -> int:
        lines = read_metrics(self.folder / "metrics.jsonl")
        return int(lines[-1]["step"]) if lines else 0

    def goes_on_from(self) -> int:
        """The step that is done at the latest when the next launch begins, however short its metrics were cut."""
        saved = [int(path.name.removeprefix("step-")) for path in (self.folder / "checkpoints").glob("step-*")]
        return max(self.step(), *saved, 0)

    def sets_aside_as_told(self) -> bool:
        """Where it did not start because its newest checkpoint may be another version's (a flipped bit of its format is
        no less), move that elsewhere, as the line says."""
        found = re.search(r"mend that, or move (step-\d+) elsewhere to go on from step \d+", self.text())
        if found:
            place = self.folder / "checkpoints" / found[1]
            place.rename(self.folder.with_suffix(f".{found[1]}"))
        return bool(found)

    def ranks(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if (
                str(self.folder) in command
                and "tests.chaos.rank" in command
                and "accelerate.commands.launch" not in command
            ):
                found.append(process)

        def number(process: psutil.Process) -> int:
            return int(process.environ().get("RANK", 9))

        return sorted(found, key=number)

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait_for_step(self, step: int) -> bool:
        """Whether it came so far; False where the launch ended before."""
        first, deadline = self.step(), time.monotonic() + LAUNCH_S
        while self.is_alive():
            # An earlier launch's steps are cut from the file when the run goes on.
            if self.step() >= step and self.step() != first:
                return True
            if time.monotonic() > deadline:
                raise Diverged(f"step {step} did not come within {LAUNCH_S:.0f} s\n{self.text()[-3000:]}")
            time.sleep(0.05)
        return False

    def wait_until_over(self, bound_s: float = END_S) -> None:
        assert self.process
        deadline = time.monotonic() + bound_s
        while self.is_alive() or self.ranks():
            if time.monotonic() > deadline:
                raise Diverged(f"processes are left {bound_s:.0f} s after the fault\n{self.text()[-3000:]}")
            time.sleep(0.1)

    def clear(self) -> None:
        processes = self.ranks()
        if self.is_alive():
            assert self.process
            processes.append(psutil.Process(self.process.pid))
        for process in processes:
            process.kill()
        if self.process:
            self.process.wait()


@dataclass
class Fault:
    """Something that happens to a run, and what must be said of it."""

    name: str
    happen: Callable[[Run, random.Random], None]
    says: tuple[str, ...] = ()
    """One of these must stand in the output; nothing need, without any."""
    within: str = ""
    """What a rank does to itself, before `happen`."""
    exact: bool = True
    """Whether the state afterwards is bit for bit that of an undisturbed run."""
    ends: bool = True
    """Whether the run ends."""


def signal_to(who: str, number: signal.Signals) -> Callable[[Run, random.Random], None]:
    def happen(run: Run, draw: random.Random) -> None:
        ranks = run.ranks()
        if who == "launcher":
            assert run.process
            run.process.send_signal(number)
        elif ranks:
            draw.choice(ranks).send_signal(number)

    return happen


def suspend(run: Run, draw: random.Random) -> None:
    ranks = run.ranks()
    victim = draw.choice(ranks)
    victim.suspend()
    # The launcher's own patience with a suspended rank is half a minute; the other ranks must be gone before.
    deadline = time.monotonic() + END_S
    while any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks if rank.pid != victim.pid):
        if time.monotonic() > deadline:
            raise Diverged(f"the other rank waits still\n{run.text()[-3000:]}")
        time.sleep(0.1)
    victim.kill()


def two_signals(run: Run, draw: random.Random) -> None:
    ranks = run.ranks()
    for number in draw.sample([signal.SIGUSR1, signal.SIGTERM, signal.SIGINT], 2):
        if ranks:
            draw.choice(ranks).send_signal(number)
        time.sleep(draw.random() * 0.2)


def no_room(run: Run, draw: random.Random) -> None:
    """From now on rank 0 can make no file larger than some kilobytes, but for the log, in which it is to say so."""
    room = run.log.stat().st_size + 2**16
    for rank in run.ranks()[:1]:
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (room, room))


def lose_checkpoints(run: Run, draw: random.Random) -> None:
    """Where the folder of checkpoints was, there is for a while something that takes no files."""
    away, place = run.folder.with_suffix(".away"), run.folder / "checkpoints"
    place.rename(away)
    place.write_text("")
    try:
        run.wait_until_over()
    finally:
        place.unlink()
        away.rename(place)


def delete_folder(run: Run, draw: random.Random) -> None:
    # At once, as far as the run can see: one that is deleted file by file may get a new checkpoint meanwhile, which stays.
    gone = run.folder.rename(run.folder.with_name(f"{run.folder.name}.deleted"))
    shutil.rmtree(gone, ignore_errors=True)


def second_launch(run: Run, draw: random.Random) -> None:
    other = Run(run.dataset, run.folder, run.log.with_suffix(".second"))
    other.launch()
    assert other.process
    try:
        other.process.wait(timeout=LAUNCH_S)
    except subprocess.TimeoutExpired as error:
        other.process.kill()
        raise Diverged("a second launch on the same folder goes on") from error
    if "is in use by" not in other.text():
        raise Diverged(f"a second launch was not told that the folder is in use\n{other.text()[-2000:]}")


def corrupt_data(run: Run, draw: random.Random) -> None:
    whole = run.dataset.read_bytes()
    broken = whole.replace(b"\xff\xd8\xff\xe0", b"\0\0\0\0")
    try:
        _overwrite(run.dataset, broken)
        run.wait_until_over()
    finally:
        _overwrite(run.dataset, whole)


def _overwrite(path: Path, data: bytes) -> None:
    """In place: the run has the file open."""
    with path.open("r+b") as file:
        file.write(data)


def nothing(run: Run, draw: random.Random) -> None:
    pass


def hurt_newest_checkpoint(run: Run, draw: random.Random) -> str:
    """Between two launches: a file of the newest checkpoint is cut short, or a few of its bytes are flipped."""
    checkpoints = sorted((run.folder / "checkpoints").glob("step-*"))
    if len(checkpoints) < 2:
        return ""
    path = draw.choice(sorted(checkpoints[-1].iterdir()))
    data = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        del data[draw.randrange(len(data)) :]
        path.write_bytes(data)
        return f"{path.name} of the newest checkpoint cut to {len(data)} bytes"
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return f"bits of {path.name} of the newest checkpoint flipped"


def hurt_metrics(run: Run, draw: random.Random) -> str:
    path = run.folder / "metrics.jsonl"
    if not path.exists() or not path.stat().st_size:
        return ""
    size = draw.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"metrics.jsonl cut to {size} bytes"


STOPPED = ("stopped after step", "SIGTERM", "is gone", "died")
OUTSIDE = [
    Fault("SIGKILL of a rank", signal_to("rank", signal.SIGKILL), ("died",)),
    Fault("SIGKILL of the launcher", signal_to("launcher", signal.SIGKILL), ("is gone", "died")),
    Fault("SIGTERM to the launcher", signal_to("launcher", signal.SIGTERM)),
    Fault("SIGTERM to a rank", signal_to("rank", signal.SIGTERM), STOPPED),
    Fault("SIGUSR1 to a rank", signal_to("rank", signal.SIGUSR1), STOPPED),
    Fault("Ctrl-C to a rank", signal_to("rank", signal.SIGINT), STOPPED),
    Fault("two different signals", two_signals),
    Fault("SIGSTOP of a rank", suspend, ("silent for", "died")),
    Fault("no room on the disk", no_room, ("can't be written", "File too large")),
    Fault("checkpoints vanish", lose_checkpoints, ("can't be",)),
    Fault("the run's folder is deleted", delete_folder),
    Fault("corrupt records", corrupt_data, ("sample", "record", "JPEG", "decode")),
]
INSIDE = [
    Fault("an error on one rank", nothing, ("injected fault",), "fail"),
    Fault("NaN on one rank", nothing, ("not finite",), "not_a_number"),
    Fault("out of memory on one rank", nothing, ("repeated with micro-batches",), "out_of_memory", exact=False, ends=False),
    Fault("no memory for the optimizer", nothing, ("in the optimizer's update",), "no_memory_for_the_optimizer"),
    Fault("the clock jumps", nothing, (), "clock_jumps", ends=False),
    Fault("a rank does not come", nothing, ("silent for",), "come_late"),
    Fault("the loader's thread dies", nothing, ("injected",), "loader_dies"),
    Fault("a second launch on the folder", second_launch, (), "linger", ends=False),
]  # fmt: skip
assert {fault.within for fault in INSIDE} == set(FAULTS)


@dataclass
class Soak:
    seed: int
    folder: Path
    counts: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    diverged: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        images = [jpeg(picture(20, 20 + number % 5, number)) for number in range(130)]
        self.dataset = write_beton(self.folder / "tiny.beton", images, num_test=30, num_classes=3)

    def undisturbed(self) -> Checkpoint:
        run = Run(self.dataset, self.folder / "undisturbed", self.folder / "undisturbed.log")
        run.launch()
        run.wait_until_over(LAUNCH_S)
        return self._final(run)

    def _final(self, run: Run) -> Checkpoint:
        if not (run.folder / "DONE").exists():
            raise Diverged(f"no DONE\n{run.text()[-3000:]}")
        checkpoint = CheckpointStore(run.folder / "checkpoints", keep=2).newest()
        assert checkpoint
        assert checkpoint.step == STEPS
        return checkpoint

    def hurt(self, seed: int, reference: Checkpoint) -> list[str]:
        """One run with faults drawn by `seed`; what was done."""
        draw = random.Random(seed)
        name = f"run-{seed}"
        run = Run(self.dataset, self.folder / name, self.folder / f"{name}.log")
        done: list[str] = []
        exact = True
        try:
            for _ in range(draw.randint(1, 4)):
                fault = draw.choice([*OUTSIDE, *INSIDE])
                start = run.goes_on_from()
                step = min(STEPS - 3, start + draw.randint(2, 20))
                if step <= start:
                    break
                within = {"kind": fault.within, "rank": draw.randint(0, 1), "step": step}
                run.launch(json.dumps(within) if fault.within else "")
                due = max(1, step - 1) if fault.within else step
                came = run.wait_for_step(due)
                if not came and run.sets_aside_as_told():
                    done.append("the checkpoint that might be another version's moved elsewhere")
                    run.launch(run.fault)
                    came = run.wait_for_step(due)
                if not came and not fault.within:
                    raise Diverged(f"it ended before the fault\n{run.text()[-3000:]}")
                done.append(f"{fault.name} at step {step}")
                self.counts[fault.name] += 1
                exact = exact and fault.exact
                fault.happen(run, draw)
                if not fault.ends:
                    run.wait_for_step(min(STEPS, step + draw.randint(1, 5)))
                    signal_to("rank", signal.SIGKILL)(run, draw)
                    done.append("then SIGKILL of a rank")
                run.wait_until_over()
                if fault.says and not any(words in run.text() for words in fault.says):
                    raise Diverged(f"{fault.name}: nothing was said of it\n{run.text()[-3000:]}")
                for hurt in (hurt_newest_checkpoint, hurt_metrics):
                    if draw.random() < 0.2 and (what := hurt(run, draw)):
                        done.append(what)
                        self.counts[hurt.__name__.replace("_", " ")] += 1
            run.launch()
            run.wait_until_over(LAUNCH_S)
            if run.sets_aside_as_told():
                run.launch()
                run.wait_until_over(LAUNCH_S)
            compare(self._final(run), reference, exact=exact)
        except Diverged as error:
            self.diverged.append(f"seed {seed}: {'; '.join(done)}: {error}")
            shutil.copy(run.log, run.log.with_suffix(".kept"))
            raise
        finally:
            run.clear()
            shutil.rmtree(run.folder, ignore_errors=True)
        return done


def compare(found: Checkpoint, reference: Checkpoint, *, exact: bool) -> None:
    for group, tensors in reference.tensors.items():
        for name, tensor in tensors.items():
            other = found.tensors[group][name]
            same = torch.equal(other, tensor) if exact else torch.allclose(other, tensor, rtol=0, atol=ONE_ROUNDING)
            if not same:
                raise Diverged(f"{group}: {name} is another than that of an undisturbed run")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long new runs are begun")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next have the numbers that follow")
    parser.add_argument("--out", type=Path, help="where the outcome goes as JSON")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options.seed, Path(folder))
        reference = soak.undisturbed()
        print(f"an undisturbed run: {time.monotonic() - start:.0f} s", flush=True)
        lines = []
        while time.monotonic() - start < 60 * options.minutes:
            seed = options.seed + soak.runs
            soak.runs += 1
            try:
                line = f"seed {seed}: {'; '.join(soak.hurt(seed, reference))}: the same state"
            except Diverged:
                line = f"DIVERGED {soak.diverged[-1]}"
            lines.append(line)
            print(line, flush=True)
            if options.out:
                outcome = {
                    "minutes": (time.monotonic() - start) / 60,
                    "runs": soak.runs,
                    "faults": dict(soak.counts.most_common()),
                    "diverged": soak.diverged,
                    "lines": lines,
                }
                options.out.write_text(json.dumps(outcome, indent=1))
    total = sum(soak.counts.values())
    print(f"{soak.runs} runs, {total} faults of {len(soak.counts)} kinds, {len(soak.diverged)} diverged")
    for name, count in soak.counts.most_common():
        print(f"{count:5d}  {name}")
    return int(bool(soak.diverged))


if __name__ == "__main__":
    sys.exit(main())
