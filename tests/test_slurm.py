"""What needs no Slurm: which ranks its tasks are, and what the scripts of slurm/ make of their environment."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dist_contrastive.slurm import FIRST_PORT, NUM_PORTS, adopt_slurm, first_host, step_port, tasks_per_node

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))

TASK = {
    "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "3", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "gpu[07-09,12]",
}  # fmt: skip
"""The environment of a task of srun, as far as it counts."""


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("n[2,4-6]", "n2"),
        ("gpu-[08-11]", "gpu-08"),
        ("gpu-a-7,gpu-b-[1-2]", "gpu-a-7"),
        ("node[0001-1024]", "node0001"),
        ("rack[1-2]n[01-03,07]", "rack1n01"),
        ("rack3n[09-10],rack[4-5]n[01-16]", "rack3n09"),
        ("c[3-4]-ib,c9", "c3-ib"),
        ("a[1,3]b[5]c,d", "a1b5c"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    ("counts", "tasks"),
    [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("3,1", [3, 1]), ("8(x2),4,8(x2)", [8, 8, 4, 8, 8]), ("1(x12)", [1] * 12)],
)
def test_tasks_per_node(counts: str, tasks: list[int]) -> None:
    assert tasks_per_node(counts) == tasks


def test_a_task_is_a_rank() -> None:
    environ = dict(TASK)
    adopt_slurm(environ)
    assert {name: value for name, value in environ.items() if name not in TASK} == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(step_port(71, 3)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"RANK": "0"}, "a launcher's rank"),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "a step of one task"),
        ({"SLURM_STEP_ID": None}, "the batch script"),
        ({"SLURM_PROCID": None}, "no task"),
    ],
)
def test_what_is_no_rank_of_slurms_is_left_alone(changes: dict[str, str | None], why: str) -> None:
    environ = {name: value for name, value in {**TASK, **changes}.items() if value is not None}
    before = dict(environ)
    adopt_slurm(environ)
    assert environ == before, why


def test_an_address_that_is_given_stays() -> None:
    environ = {**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"}
    adopt_slurm(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "4711")


def test_steps_beside_one_another_meet_at_ports_of_their_own() -> None:
    ports = {step_port(job, step) for job in range(100_000, 100_300) for step in range(20)}
    assert len(ports) == 300 * 20
    assert min(ports) >= FIRST_PORT
    assert max(ports) < FIRST_PORT + NUM_PORTS <= 32768


@pytest.mark.parametrize(
    "path", [*SCRIPTS, ROOT / "slurm" / "job.sh", ROOT / "slurm" / "site.env"], ids=lambda p: p.name
)
def test_shellcheck_finds_nothing(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    checked = subprocess.run(
        ["shellcheck", "--external-sources", str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_scripts_header_says_how_it_is_submitted(path: Path) -> None:
    text = path.read_text()
    assert f"slurm/{path.name}" in text.partition("#SBATCH")[0]
    assert f"slurm/{path.name}" in (ROOT / "slurm" / "README.md").read_text()


def in_job(script: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run lines of bash as the first node of a job would, from `folder`."""
    venv = folder / "venv" / "bin"
    venv.mkdir(parents=True, exist_ok=True)
    (venv / "python").touch(mode=0o755)
    (folder / "site.env").write_text(f"SITE_VENV={venv.parent}\nSITE_MAX_REQUEUES=2\nsite_setup() {{ :; }}\n")
    known = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "pretrain", "SLURM_JOB_NODELIST": "n1", "SITE_ENV": "site.env"}
    return subprocess.run(
        ["bash", "-c", f"source {ROOT}/slurm/job.sh\n{script}"], cwd=folder, env={"PATH": os.environ["PATH"], **known, **environ},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_missing_settings_or_environment_are_told(tmp_path: Path) -> None:
    missing = in_job("echo goes on", tmp_path, SITE_ENV="gone.env")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: gone.env, the settings of this site, can't be read")
    (tmp_path / "other.env").write_text("SITE_VENV=nowhere\nsite_setup() { :; }\n")
    missing = in_job("echo goes on", tmp_path, SITE_ENV="other.env")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: there is no nowhere/bin/python: run make setup")


def test_the_sites_own_settings_are_complete(tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(tmp_path / "venv")
    shutil.copy(ROOT / "slurm" / "site.env", tmp_path / "own.env")
    show = "printf '%s\\n' $SITE_MAX_REQUEUES $SITE_SCRATCH $NUMBA_CACHE_DIR"
    told = in_job(show, tmp_path, SITE_ENV="own.env", USER="me")
    scratch = "/tmp/dist_contrastive-me"
    assert (told.stdout.split(), told.stderr) == (["3", scratch, f"{scratch}/numba"], "")


def test_a_set_up_of_the_site_that_fails_is_told_and_may_be_careless(tmp_path: Path) -> None:
    for number, (setup, outcome) in enumerate((("false", 2), ("echo $UNSET; false; true", 0))):
        (tmp_path / f"{number}.env").write_text(f"SITE_VENV=venv\nsite_setup() {{ {setup}; }}\n")
        told = in_job("true", tmp_path, SITE_ENV=f"{number}.env")
        assert told.returncode == outcome, told.stderr


@pytest.mark.parametrize(
    ("gpus", "tasks", "is_warned"), [("8", "8(x2)", False), ("8", "1(x2)", True), ("", "2", False), ("4", "4,2", False)]
)
def test_a_rank_takes_one_gpu(gpus: str, tasks: str, is_warned: bool, tmp_path: Path) -> None:
    told = in_job("compare_ranks_with_gpus", tmp_path, SLURM_GPUS_ON_NODE=gpus, SLURM_TASKS_PER_NODE=tasks)
    assert ("warning: 8 GPU(s) and 1 rank(s) on a node; --ntasks-per-node=8" in told.stdout) == is_warned
    assert told.returncode == 0, told.stderr


@pytest.mark.parametrize(
    ("names", "step"),
    [
        ([], 0),
        (["step-00000008", "step-00000010"], 10),
        (["step-99999999", "step-100000000"], 100_000_000),
        ([".incomplete-step-00000012", "set-aside-step-00000009", "step-00000003"], 3),
    ],
)
def test_the_newest_checkpoint_tells_the_progress(names: list[str], step: int, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    assert in_job("saved_step run", tmp_path).stdout == f"{step}\n"
