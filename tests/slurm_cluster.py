"""A real Slurm of three nodes on this machine: munged, slurmctld and three slurmd in a folder of its own.

Each node has a mount namespace: a hosts file in which the nodes' names are the loopback, and a disk of its own, which the
other nodes don't see. The namespace also tells which processes are the node's: a node that is killed takes all of them
along, as a power cut would. Each has one core, with those of the machine dealt out in turn.
"""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

NODES = ("n1", "n2", "n3")
NODE_LINE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4096 State=UNKNOWN"
DAEMONS = ("munged", "slurmctld", "slurmd")
TIMEOUT_S = 60.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

# What is not Slurm's default, and why:
# - both daemons of a node and the controller talk over the loopback, as root, with munge on a socket of this cluster's;
# - cred_expire is how long a requeued job waits before it may start again (120 s by default; 5 s is the least);
# - nothing is accounted, tracked or bound: that takes cgroups, or daemons of its own;
# - time-outs in seconds in which a test sees a node's death or a preemption.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here; None where one can."""
    missing = [name for name in DAEMONS if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None]
    if missing:
        return f"Slurm is not installed: {', '.join(missing)} not found (apt-get install --no-install-recommends slurm-wlm munge)"
    if os.geteuid() != 0:
        return f"Slurm's daemons run as root in these tests, and this is {getpass.getuser()}"
    unshared = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False)
    if unshared.returncode:
        return f"no mount namespace can be made here, which each node needs: {unshared.stderr.strip()}"
    return None


class Cluster:
    """Context manager: within it the cluster runs; after it none of its processes is left.

    Attributes:
        environment: what a command needs to talk to this cluster (`run` passes it).
        local: where each node has its own disk; `disk` tells where that lies for everybody.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.local = folder / "local"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._write_config()
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
            for node in NODES:
                self.start_node(node)
            self.wait(lambda: all(self.node_state(node) == "idle" for node in NODES), "all nodes to be idle")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop()

    def _write_config(self) -> None:
        host = socket.gethostname().partition(".")[0]
        for name in ("state", "munge", "local", *(f"{kind}-{node}" for kind in ("spool", "local") for node in NODES)):
            (self.folder / name).mkdir(parents=True, mode=0o700)
        self.folder.chmod(0o755)  # munge's clients reach its socket through it
        (self.folder / "munge").chmod(0o755)
        port, *ports = _free_ports(1 + len(NODES))
        nodes = [NODE_LINE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports, strict=True)]
        config = CONFIG.format(host=host, folder=self.folder, port=port, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", host, *NODES)))

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self._start(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder / 'socket'}",
            f"--pid-file={folder / 'pid'}", f"--log-file={folder / 'log'}", f"--seed-file={folder / 'seed'}",
        )  # fmt: skip
        self.wait((folder / "socket").exists, "munge's socket")

    def _start(self, name: str, *command: str) -> None:
        """Start a daemon in a mount namespace of its own; it ends with this process, however that ends."""
        local = self.disk(name) if name in NODES else self.local
        script = 'mount --bind "$0" /etc/hosts && mount --bind "$1" "$2" && shift 2 && exec "$@"'
        with open(self.folder / f"{name}.out", "ab") as output:
            self._processes[name] = subprocess.Popen(
                [
                    "setpriv", "--pdeathsig", "KILL", "unshare", "--mount",
                    "bash", "-c", script, str(self.folder / "hosts"), str(local), str(self.local), *command,
                ],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env={**self.environment, "PATH": f"{os.environ['PATH']}:/usr/sbin"},
            )  # fmt: skip

    def start_node(self, node: str) -> None:
        """Start the node's slurmd, for the first time or after `kill_node`."""
        cores = sorted(os.sched_getaffinity(0))
        core = cores[NODES.index(node) % len(cores)]
        self._start(
            node, "taskset", "--cpu-list", str(core), "slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf")
        )

    def disk(self, node: str) -> Path:
        """What lies on the node's own disk, which the node itself has at `local`."""
        return self.folder / f"local-{node}"

    def kill_node(self, node: str) -> None:
        """End everything on the node at once: its slurmd, and its jobs."""
        self._kill(self._processes.pop(node))

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill the process and all that is in its mount namespace: a job's processes are no longer its children."""
        namespace = _namespace(process.pid)
        while namespace is not None and namespace != _namespace(os.getpid()):
            left = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _namespace(pid) == namespace]
            if not left:
                break
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        process.kill()
        process.wait()

    def _stop(self) -> None:
        for name in reversed(list(self._processes)):
            self._kill(self._processes.pop(name))

    def run(
        self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm's (sbatch, srun, …) on this cluster."""
        environment = {**self.environment, **(env or {})}
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def submit(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """`sbatch` with these arguments, from the folder `cwd`; the job's number."""
        submitted = self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env)
        assert submitted.returncode == 0, submitted.stderr
        return submitted.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it: JobState, Restarts, ExitCode, …"""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        assert shown.returncode == 0, shown.stderr
        return dict(re.findall(r"(\S+?)=(\S*)", shown.stdout))

    def node_state(self, node: str) -> str:
        """idle, allocated, down, …; empty where the controller does not answer yet."""
        return self.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T", "--partition=normal").stdout.strip()

    def wait_for(self, job: str, *states: str, timeout_s: float = TIMEOUT_S) -> dict[str, str]:
        """Wait until the job is in one of the states; what is known of it then."""

        def is_there() -> bool:
            state = self.job(job)["JobState"]
            assert state in states or state not in ENDED, f"{self.job(job)}\n{self.log()}"
            return state in states

        self.wait(is_there, f"job {job} to be {' or '.join(states)}", timeout_s)
        return self.job(job)

    def wait_for_end(self, job: str, timeout_s: float = 2 * TIMEOUT_S) -> dict[str, str]:
        """Wait until the job has ended for good; what is known of it then."""
        return self.wait_for(job, *ENDED, timeout_s=timeout_s)

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until `condition` holds; `AssertionError` after `timeout_s`, or where a daemon has ended."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            for name, process in self._processes.items():
                assert process.poll() is None, f"{name} has ended\n{self.log()}"
            assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}\n{self.log()}"
            time.sleep(0.1)

    def log(self) -> str:
        """The ends of the daemons' logs."""
        names = ["slurmctld.log", *(f"slurmd-{node}.log" for node in NODES), "munged.out", "slurmctld.out"]
        return "\n".join(f"--- {name}\n{_tail(self.folder / name)}" for name in names)


def _namespace(pid: int) -> str | None:
    """Names the mount namespace of a process; None where there is no such process."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return None


def _tail(path: Path, num_lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-num_lines:]) if path.exists() else "(none)"


def _free_ports(count: int) -> Sequence[int]:
    """Ports of the loopback that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports
