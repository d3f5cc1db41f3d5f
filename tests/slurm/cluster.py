"""A real SLURM cluster on this machine: munge, slurmctld, and two nodes that are two slurmd of one host.

As root, from Debian's packages, without systemd. What makes two nodes of one machine: the same NodeHostname, a port and
a `slurmd -N NAME` each. Processors, memory and GPUs are what the scheduler is told, not what is there.

    python -m tests.slurm.cluster install      # apt-get, once
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
NODES = ("r1v2node1", "r1v2node2")
GRACE_SECONDS = 40
"""Between the SIGTERM of a preemption and its end."""
_HOSTS = Path("/etc/hosts")
_HOSTS_LINE = f"127.0.0.1 {' '.join(NODES)}\n"


def why_not() -> str | None:
    """Return why no cluster can be started here; None: one can."""
    if os.geteuid() != 0:
        return "a SLURM cluster of one's own needs root"
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        return (
            f"SLURM is not installed ({', '.join(missing)} not found): `make slurm-test` installs it where apt-get is"
        )
    if not os.access(_HOSTS, os.W_OK):
        return f"{_HOSTS} cannot be written, and the names of the nodes must resolve"
    return None


def install() -> None:
    """Install SLURM, where apt-get is and we are root; say why not elsewhere."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        print("SLURM is not installed: that needs root and apt-get; its tests will be skipped", file=sys.stderr)
        return
    if all(_program(name) for name in PROGRAMS):
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
    subprocess.run(
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES], check=True, env=environment
    )


class Cluster:
    """The daemons, their files in one folder, and what a user would type."""

    def __init__(self, folder: Path, *, gpus: int = 1) -> None:
        """Write the configuration.

        Args:
            folder: for everything; its path should be short, sockets are in it.
            gpus: of each node: files that the scheduler looks at, nothing behind them. Exclusive jobs get all.
        """
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        for name in ("state", "log", "run", "munge", *NODES):
            (folder / name).mkdir()
        (folder / "munge").chmod(0o700)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for index in range(gpus):  # as /dev/null is: a character device must be there
            os.mknod(folder / f"gpu{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        host, ports = socket.gethostname().split(".")[0], _free_ports(1 + len(NODES))
        lines = _CONFIGURATION.format(folder=folder, host=host, port=ports[0], grace=GRACE_SECONDS)
        for name, port in zip(NODES, ports[1:], strict=True):
            lines += (
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 Sockets=1 "
                f"CoresPerSocket=64 ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:{gpus} State=UNKNOWN\n"
            )
        (folder / "slurm.conf").write_text(lines)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{gpus - 1}] Flags=nvidia_gpu_env\n")
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")

    def __enter__(self) -> Cluster:
        if _HOSTS_LINE not in _HOSTS.read_text():
            with _HOSTS.open("a") as file:
                file.write(_HOSTS_LINE)
        munge = self.folder / "munge"
        self._start(
            "munged", "--force", f"--key-file={munge}/key", f"--socket={self.folder}/run/munge.socket",
            f"--pid-file={self.folder}/run/munged.pid", f"--log-file={self.folder}/log/munged.log",
            f"--seed-file={munge}/seed",
        )  # fmt: skip
        self._start("slurmctld")
        for name in NODES:
            self.start_node(name)
        idle = ("sinfo", "-h", "-N", "-p", "work", "-t", "idle", "-o", "%N")
        self.wait_until(lambda: sorted(self._say(*idle).split()) == [*NODES], "idle nodes")
        return self

    def __exit__(self, *_: object) -> None:
        self._say("scancel", "--state=PENDING,RUNNING,SUSPENDED", "--full", "--signal=KILL", "--me", check=False)
        self._say("scancel", "--me", check=False)
        with contextlib.suppress(AssertionError):
            self.wait_until(lambda: not self._say("squeue", "-h", check=False).strip(), "an empty queue", seconds=60)
        for name in NODES:
            self._end(f"slurmd-{name}")
        self._end("slurmctld")
        self._end("munged")
        # In place: the file may be a mount of its own.
        _HOSTS.write_text(_HOSTS.read_text().replace(_HOSTS_LINE, ""))

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        self._start("slurmd", "-N", name)

    def kill_node(self, name: str) -> None:
        """Kill the daemon of a node, with the processes of its job steps, as a machine that loses power does."""
        self._end(f"slurmd-{name}", signal.SIGKILL)
        for pid in self._processes(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def submit(self, script: str, *arguments: str, options: Sequence[str] = (), **variables: str) -> int:
        """Submit a script of the repository and return the job's number.

        Args:
            script: its path.
            arguments: of the script.
            options: of sbatch.
            variables: of the job's environment.
        """
        told = self._say("sbatch", "--parsable", *options, script, *arguments, variables=variables)
        return int(told.strip().split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """Return what `scontrol show job` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self._say("scontrol", "show", "job", str(number))))

    def warn(self, number: int) -> None:
        """Send the batch script the signal that SLURM sends it before the time is up (--signal=B:USR1@...)."""
        self._say("scancel", "--batch", "--signal=USR1", str(number))

    def requeue(self, number: int) -> None:
        """Put a job back, as SLURM does when a node fails."""
        self._say("scontrol", "requeue", str(number))

    def steps(self, number: int) -> list[str]:
        """Return the steps of a job that srun has started, the batch script not among them."""
        told = self._say("squeue", "-h", "--steps", "--format=%i", "--jobs", str(number)).split()
        return [step for step in told if not step.endswith((".batch", ".extern"))]

    def start_now(self, number: int) -> None:
        """Spare a job that was put back the two minutes that SLURM has it wait.

        Not the first seconds: a node takes a start within the second of the last end for one that was cancelled.
        """
        time.sleep(3)
        self._say("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)

    def wait_for_end(self, number: int, *, seconds: float = 400.0) -> dict[str, str]:
        """Wait until a job has ended for good, started again as often as it is put back; returns what SLURM says."""

        def has_ended() -> bool:
            told = self.job(number)
            state = told["JobState"]
            if state == "PENDING" and told["Restarts"] != "0":
                self.start_now(number)
            return state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        self.wait_until(has_ended, f"the end of job {number}", seconds=seconds)
        return self.job(number)

    def wait_until(self, condition: Callable[[], bool], what: str, *, seconds: float = 120.0) -> None:
        """Wait for a condition; after so many seconds the test fails, with the controller's log."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                log = (self.folder / "log" / "slurmctld.log").read_text(errors="replace")[-3000:]
                raise AssertionError(f"no {what} after {seconds:g} s:\n{self._say('squeue', check=False)}\n{log}")
            time.sleep(0.1)

    def _processes(self, node: str) -> list[int]:
        """Return the processes that run on behalf of a node: those that have its name in their environment."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                told = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            ours = f"SLURM_CONF={self.folder}/".encode() in told
            if ours and f"SLURMD_NODENAME={node}\0".encode() in told and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        return found

    def _say(self, *command: str, check: bool = True, variables: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            command,
            env={**self.environment, **(variables or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode} {done.stderr}{done.stdout}"
        return done.stdout

    def _start(self, program: str, *arguments: str) -> None:
        path = _program(program)
        assert path is not None
        log = self.folder / "log" / f"{program}.out"
        with log.open("a") as file:  # the daemon keeps what it is given: not a pipe, whose end we would wait for
            done = subprocess.run(
                [path, *arguments],
                env=self.environment,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        assert done.returncode == 0, f"{program}: {log.read_text()}"

    def _end(self, name: str, number: int = signal.SIGTERM) -> None:
        path = self.folder / "run" / f"{name}.pid"
        if not path.is_file() or not path.read_text().strip():
            return
        pid = int(path.read_text())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            for _ in range(100):
                os.kill(pid, 0)
                time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)
        path.unlink(missing_ok=True)


_CONFIGURATION = """ClusterName=r1v2test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
ReturnToService=2
SlurmdTimeout=20
MinJobAge=3600
PartitionName=work Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={grace} PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        raise SystemExit("usage: python -m tests.slurm.cluster install")
    install()
