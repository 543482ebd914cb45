"""The job scripts of slurm/ on a real Slurm: what ends a job, what brings it back, and what is the same afterwards.

Each job is submitted as a user would, from a folder with a copy of slurm/ and a site.env of its own.
"""

import json
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dist_contrastive.checkpoint import Checkpoint
from dist_contrastive.data.packing import write_dataset as pack
from dist_contrastive.data.sources import open_source
from dist_contrastive.metrics import read_metrics
from tests.harness import run_ranks
from tests.runs import assert_same_state, newest_checkpoint, write_dataset
from tests.slurm_cluster import NODES, Cluster, why_not
from tests.test_command import command, options

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "pretrain": ["photos", "--epochs", "2"],
    "probe": ["runs/photos"],
    "embed": ["runs/photos", "data/photos.beton", "vectors.parquet"],
    "sweep": ["sweep.txt", "photos"],
    "throughput": ["loader"],
}
"""With arguments that they take."""
TIMEOUT_S = 240.0
EPOCHS = 12

SITE = """
SITE_VENV={venv}
SITE_SCRATCH={scratch}
SITE_MAX_REQUEUES=1
site_setup() {{ export PYTHONPATH={root}; }}
"""


@dataclass(frozen=True)
class Place:
    """Where a user submits from."""

    cluster: Cluster
    folder: Path

    def submit(self, script: str, *arguments: str, sbatch: tuple[str, ...] = (), site: str = "site.env") -> str:
        """Submit slurm/SCRIPT.sbatch; the job's number."""
        file = f"slurm/{script}.sbatch"
        return self.cluster.submit(*sbatch, file, *arguments, cwd=self.folder, env={"SITE_ENV": site})

    def log(self, name: str) -> str:
        """slurm/logs/NAME.log, empty where there is none."""
        path = self.folder / "slurm" / "logs" / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def logs(self) -> str:
        """All that the jobs have said, for a failing test."""
        paths = sorted((self.folder / "slurm" / "logs").glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in paths)

    def ended(self, job: str, state: str, restarts: int) -> None:
        """Wait for the job's end, which must be `state` after so many times in the queue again."""
        found = self.cluster.wait_for_end(job, TIMEOUT_S)
        assert (found["JobState"], int(found["Restarts"])) == (state, restarts), self.logs()

    def write_site(self, name: str, venv: Path) -> None:
        settings = SITE.format(venv=venv, scratch=self.cluster.local, root=ROOT)
        (self.folder / name).write_text(settings)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("*.log"))
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        here = Place(cluster, folder)
        here.write_site("site.env", Path(sys.prefix))
        yield here


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def run_options(dataset: Path, run_dir: Path, *more: str) -> list[str]:
    """A run long enough to be disturbed in its midst."""
    return options(dataset, run_dir, "--probe.no-enabled", "--epochs", str(EPOCHS), *more)


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """What a run of two ranks comes to that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert [status for status, _ in run_ranks(command, 2, run_options(dataset, run_dir))] == [0, 0]
    return newest_checkpoint(run_dir)


def start(place: Place, dataset: Path, name: str) -> tuple[str, Path]:
    """A job of two nodes with one rank each that is in the midst of its training: its number, its run's folder."""
    run_dir = place.folder / "runs" / name
    sbatch = ("--nodes=2", f"--job-name={name}")
    job = place.submit("pretrain", *run_options(dataset, run_dir), sbatch=sbatch)
    wait_for_steps(place, run_dir, 8)
    return job, run_dir


def wait_for_steps(place: Place, run_dir: Path, num_steps: int) -> None:
    def are_done() -> bool:
        path = run_dir / "metrics.jsonl"
        return path.exists() and len(read_metrics(path)) >= num_steps

    try:
        place.cluster.wait(are_done, f"step {num_steps} of {run_dir}", TIMEOUT_S)
    except AssertionError as error:
        error.add_note(place.logs())
        raise


def assert_done_as(undisturbed: Checkpoint, run_dir: Path) -> None:
    assert (run_dir / "DONE").exists()
    assert_same_state(newest_checkpoint(run_dir), undisturbed)


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_takes_the_scripts(script: str, place: Place) -> None:
    tested = place.cluster.run("sbatch", "--test-only", f"slurm/{script}.sbatch", *SCRIPTS[script], cwd=place.folder)
    assert tested.returncode == 0, tested.stderr
    assert "error" not in tested.stderr


@pytest.fixture(scope="module")
def photos_job(place: Place) -> str:
    """A job that has trained `photos`, a tenth of the patches, on two nodes with two ranks each."""
    source = open_source("photos")
    pack(replace(source, samples=source.samples[::10]), place.folder / "data" / "photos.beton")
    job = place.submit("pretrain", "photos", "--epochs", "4", sbatch=("--nodes=2", "--ntasks-per-node=2"))
    place.ended(job, "COMPLETED", restarts=0)
    return job


def test_photos_are_trained_on_two_nodes_of_two_ranks(place: Place, photos_job: str) -> None:
    run_dir = place.folder / "runs" / f"photos-{photos_job}"
    assert (run_dir / "DONE").exists()
    assert json.loads((run_dir / "machine.json").read_text())["ranks"] == 4
    assert 0 < json.loads((run_dir / "probe.json").read_text())["linear_top1"] < 1
    assert "4 rank(s), cpu, gloo, fp32" in place.log(f"pretrain-{photos_job}.rank-0")
    assert len(list((place.folder / "slurm" / "logs").glob(f"pretrain-{photos_job}.rank-[0-3].log"))) == 4
    # The dataset was copied once on each of the two nodes, and read there; code was compiled there.
    assert place.log(f"pretrain-{photos_job}").count("copied") == 2
    copied_to = json.loads((run_dir / "config.json").read_text())["data"]["path"]
    assert Path(copied_to).parent == place.cluster.local
    for node in NODES[:2]:
        assert (place.cluster.disk(node) / Path(copied_to).name).is_file()
        assert list((place.cluster.disk(node) / "numba").rglob("*.nbi"))
    assert not list(place.cluster.disk(NODES[2]).iterdir())


def test_a_run_is_scored_again_and_the_loader_measured(place: Place, photos_job: str) -> None:
    run_dir = place.folder / "runs" / f"photos-{photos_job}"
    (place.folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    measuring = ("loader", "--cases", "small", "--data", "data/photos.beton", "--batch", "64", "--rounds", "1")
    small = ("--slow-samples", "0", "--fresh-rounds", "0", "--out", "measured")
    measured = place.submit("throughput", *measuring, *small)
    scored = place.submit("probe", str(run_dir))
    place.ended(measured, "COMPLETED", restarts=0)
    assert "images/s" in place.log(f"throughput-{measured}")
    assert (place.folder / "measured" / "loader.json").is_file()
    place.ended(scored, "COMPLETED", restarts=0)
    assert len(list((run_dir / "probes").glob("*.json"))) == 1


def test_a_users_signal_changes_nothing(place: Place, dataset: Path, undisturbed: Checkpoint) -> None:
    job, run_dir = start(place, dataset, "signal")
    # To the batch script and its srun, too, which must outlive it.
    assert place.cluster.run("scancel", "--full", "--signal=USR1", job).returncode == 0
    place.ended(job, "COMPLETED", restarts=1)
    assert "stopped; requeued" in place.log(f"signal-{job}")
    assert_done_as(undisturbed, run_dir)


def test_a_preemption_changes_nothing(place: Place, dataset: Path, undisturbed: Checkpoint) -> None:
    job, run_dir = start(place, dataset, "preempted")
    urgent = place.cluster.submit(
        "--partition=urgent", f"--nodes={len(NODES)}", "--exclusive", "--wrap=true", cwd=place.folder
    )
    place.cluster.wait_for_end(urgent)
    place.ended(job, "COMPLETED", restarts=1)
    assert "stopped; requeued" in place.log(f"preempted-{job}"), "saved at once, not killed after the time of grace"
    assert_done_as(undisturbed, run_dir)


def test_killed_nodes_change_nothing(place: Place, dataset: Path, undisturbed: Checkpoint) -> None:
    cluster = place.cluster
    job, run_dir = start(place, dataset, "killed")
    # The third node, which comes in, need not compile.
    shutil.copytree(cluster.disk(NODES[0]) / "numba", cluster.disk(NODES[2]) / "numba", dirs_exist_ok=True)
    cluster.kill_node(NODES[1])
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", "the job to be requeued")
    cluster.start_node(NODES[1])
    # On the first node, where the batch script runs, and the third.
    wait_for_steps(place, run_dir, 2 * EPOCHS)
    cluster.kill_node(cluster.job(job)["BatchHost"])
    place.ended(job, "COMPLETED", restarts=2)
    assert_done_as(undisturbed, run_dir)
    cluster.start_node(NODES[0])


def test_an_array_trains_a_recipe_with_three_sets_of_options(place: Place, dataset: Path) -> None:
    (place.folder / "sweep.txt").write_text("--seed 1\n\n--seed 3 --run-dir 'runs/with a space'\n")
    common = ["photos", *options(dataset, Path("runs/unused"), "--probe.no-enabled", "--epochs", "1")[1:]]
    common = [word for word in common if word not in ("--run-dir", "runs/unused")]
    array = place.submit("sweep", "sweep.txt", *common, sbatch=("--array=1-3",))
    for task in (1, 2, 3):
        place.ended(f"{array}_{task}", "COMPLETED", restarts=0)
    runs = place.folder / "runs"
    for name, seed in ((f"photos-{array}_1", 1), (f"photos-{array}_2", 0), ("with a space", 3)):
        assert (runs / name / "DONE").exists(), place.logs()
        assert json.loads((runs / name / "config.json").read_text())["seed"] == seed
    assert "1 rank(s)" in place.log(f"sweep-{array}_3.rank-0")
    beyond = place.submit("sweep", "sweep.txt", *common, sbatch=("--array=4",))
    place.ended(f"{beyond}_4", "FAILED", restarts=0)
    assert "sweep.txt has no line 4; its tasks are --array=1-3" in place.log(f"sweep-{beyond}_4")


def test_a_run_that_fails_is_not_requeued(place: Place, dataset: Path) -> None:
    run_dir = place.folder / "runs" / "diverges"
    diverges = place.submit("pretrain", *run_options(dataset, run_dir, "--optim.learning-rate", "1e30"))
    missing = place.submit("pretrain", "photos", "--data.path", "gone.beton")
    mistaken = place.submit("pretrain", "photo")
    for job in (mistaken, missing):
        place.ended(job, "FAILED", restarts=0)
    assert "error: unknown recipe photo (did you mean photos?)" in place.log(f"pretrain-{mistaken}")
    assert "error: no packed dataset at gone.beton" in place.log(f"pretrain-{missing}")
    place.ended(diverges, "FAILED", restarts=0)
    assert "failed at step" in place.log(f"pretrain-{diverges}")


STAND_IN = """#!/usr/bin/env bash
# In place of Python, for what the job script makes of it: {behaviour}
case "$*" in
    *dist_contrastive.stage*) echo "$3" ;;
    *dist_contrastive.train*) {train} ;;
    *dist_contrastive.status*) echo "{says}"; exit {status} ;;
    *) printf '%s\\n' {run} some.beton ;;
esac
"""


NEWS = "as of $(date +%s.%N)"
"""What `status` says of a run that this launch has changed."""


def submit_stand_in(
    place: Place, behaviour: str, *, train: str, status: int | str, says: str = NEWS, sbatch: tuple[str, ...] = ()
) -> str:
    """Submit a job whose ranks are a line of bash and whose run is then said to have that status."""
    python = place.folder / behaviour / "bin" / "python"
    python.parent.mkdir(parents=True)
    run = place.folder / "runs" / behaviour
    python.write_text(STAND_IN.format(behaviour=behaviour, train=train, status=status, says=says, run=run))
    python.chmod(0o755)
    site = f"{behaviour}.env"
    place.write_site(site, python.parents[1])
    return place.submit("pretrain", "photos", sbatch=(f"--job-name={behaviour}", *sbatch), site=site)


@pytest.fixture(scope="module")
def limited(place: Place) -> str:
    """A job with a minute of time. Slurm looks at times twice a minute: it runs while other tests wait for their jobs."""
    waits = "import signal, sys, time; signal.signal(10, lambda *_: sys.exit(75)); time.sleep(600)"
    train = f'if [[ $SLURM_RESTART_COUNT ]]; then exit 0; fi; {sys.executable} -c "{waits}"'
    return submit_stand_in(
        place, "limited", train=train, status="$((SLURM_RESTART_COUNT ? 0 : 75))", sbatch=("--time=1",)
    )


@pytest.mark.usefixtures("limited")
def test_a_run_that_stops_again_and_again_is_given_up(place: Place) -> None:
    """SITE_MAX_REQUEUES is 1: the second start without a later checkpoint is the last."""
    still = submit_stand_in(place, "still", train="exit 75", status=75)
    checkpoints = place.folder / "runs" / "moves" / "checkpoints"
    save = f"mkdir -p {checkpoints}/step-0000009$((SLURM_RESTART_COUNT < 1 ? 0 : 1)); exit 75"
    moves = submit_stand_in(place, "moves", train=save, status=75)
    place.ended(still, "FAILED", restarts=2)
    assert "gives up: it was requeued 2 times and got no further than step 0" in place.log(f"still-{still}")
    place.ended(moves, "FAILED", restarts=4)
    assert "gives up: it was requeued 2 times and got no further than step 91" in place.log(f"moves-{moves}")


def test_what_an_earlier_launch_has_left_is_not_what_became_of_this_one(place: Place) -> None:
    job = submit_stand_in(place, "stale", train="exit 1", status=75, says="stopped as of yesterday")
    place.ended(job, "FAILED", restarts=0)
    assert "failed; see" in place.log(f"stale-{job}")


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_to_ranks_that_have_not_begun_is_no_failure(name: str, place: Place) -> None:
    train = "if [[ $SLURM_RESTART_COUNT ]]; then exit 0; fi; echo here; exec sleep 600"
    status = "$((SLURM_RESTART_COUNT ? 0 : 1))"
    job = submit_stand_in(place, f"early-{name}", train=train, status=status)
    place.cluster.wait(lambda: "here" in place.log(f"early-{name}-{job}.rank-0"), "the job to run")
    assert place.cluster.run("scancel", f"--signal={name}", job).returncode == 0
    place.ended(job, "COMPLETED", restarts=1)
    assert "stopped before the first step; requeued" in place.log(f"early-{name}-{job}")


def test_a_job_that_is_cancelled_stays_so(place: Place) -> None:
    waits = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('here', flush=True); time.sleep(600)"
    job = submit_stand_in(place, "cancelled", train=f'{sys.executable} -c "{waits}"', status=75)
    place.cluster.wait(lambda: "here" in place.log(f"cancelled-{job}.rank-0"), "the job to run")
    assert place.cluster.run("scancel", job).returncode == 0
    place.cluster.wait(
        lambda: "stopped; " in place.log(f"cancelled-{job}"), "the script to see that the run has stopped"
    )
    place.ended(job, "CANCELLED", restarts=0)


def test_a_job_at_its_time_limit_is_requeued_and_ends(place: Place, limited: str) -> None:
    place.ended(limited, "COMPLETED", restarts=1)
    assert "stopped; requeued" in place.log(f"limited-{limited}")


def test_a_node_without_room_lets_all_read_the_dataset_where_it_is(place: Place, dataset: Path) -> None:
    """Ranks are told one path, and it must hold on each of their nodes."""
    script = f'source slurm/job.sh; echo "path $(staged {dataset})"'
    blocked = place.cluster.disk(NODES[1]) / "small"
    for node in NODES[:2]:
        folder = place.cluster.disk(node) / "small"
        folder.touch() if node == NODES[1] else folder.mkdir()
    assert blocked.is_file()
    settings = (place.folder / "site.env").read_text()
    (place.folder / "small.env").write_text(f"{settings}SITE_SCRATCH={place.cluster.local}/small\n")
    job = place.cluster.submit(
        "--nodes=2", "--ntasks-per-node=1", "--output=staged.log", "--wrap", f"bash -c '{script}'",
        cwd=place.folder, env={"SITE_ENV": "small.env"},
    )  # fmt: skip
    place.ended(job, "COMPLETED", restarts=0)
    said = (place.folder / "staged.log").read_text()
    assert f"path {dataset}" in said
    assert said.count("copied") == 1
    assert said.count("can't hold a copy") == 1


def test_a_port_in_use_is_told_in_one_line(place: Place, dataset: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = place.cluster.run(
            "srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", sys.executable, "-m", "dist_contrastive.train",
            *run_options(dataset, place.folder / "runs" / "port"), cwd=ROOT, env={"MASTER_PORT": port}, timeout_s=TIMEOUT_S,
        )  # fmt: skip
    assert refused.returncode != 0
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert f"port {port} (MASTER_PORT) of {NODES[0]} is taken" in line
