"""A real Slurm in a temporary folder: munged, slurmctld and two slurmd, all on this machine's loopback.

Two nodes that are one machine: the first has the machine's own name, since at that address the ranks meet.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")
NODES = (socket.gethostname().split(".")[0], "z-second")


def missing() -> str | None:
    """Why no Slurm can be started here; None where it can."""
    search = os.environ["PATH"] + os.pathsep + "/usr/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=search) is None]
    if absent:
        return f"{absent[0]} is not installed (Debian packages slurm-wlm and munge)"
    return None if os.geteuid() == 0 else "a Slurm of one's own needs root"


class Cluster:
    """Started on entering, ended on leaving; commands run with `call`, in the repository's root."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.environ["PATH"] + os.pathsep + "/usr/sbin",
        }
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        folder, host = self.folder, NODES[0]
        for name in ("state", "spool", "run"):
            (folder / name).mkdir(mode=0o755)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        controller, first, second = free_ports(3)
        (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-7]\n")
        (folder / "slurm.conf").write_text(f"""
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
SchedulerParameters=sched_interval=1,bf_interval=1
GresTypes=gpu
NodeName=DEFAULT CPUs=16 Gres=gpu:8 State=UNKNOWN
NodeName={host} NodeAddr=127.0.0.1 Port={first}
NodeName=z-second NodeAddr=127.0.0.2 Port={second}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
""")
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--socket={folder}/munge.socket",
            f"--key-file={folder}/munge.key",
            f"--pid-file={folder}/run/munged.pid",
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munge.seed",
        )
        self.until(lambda: (folder / "munge.socket").exists(), "munged", 15)
        self._daemon("slurmctld", "-D")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        self.until(lambda: self._idle() == len(NODES), "idle nodes", 20)

    def __exit__(self, *_: object) -> None:
        self.call("scancel", "--full", "--user=root", check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("a") as log:
            self.daemons.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=log))

    def _idle(self) -> int:
        return self.call("sinfo", "-h", "-N", "-o", "%T", check=False).split().count("idle")

    def until(self, true: Callable[[], bool], what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                logs = "\n".join(f"{p.name}: {p.read_text()[-800:]}" for p in self.folder.glob("*.out"))
                raise AssertionError(f"no {what} within {seconds} s\n{logs}")
            time.sleep(0.2)

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self.env, capture_output=True, text=True, check=False, timeout=60
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def state(self, job: str) -> str:
        """The job's state, for example RUNNING, PENDING, COMPLETED."""
        out = self.call("scontrol", "show", "job", job, check=False)
        return next((word.split("=")[1] for word in out.split() if word.startswith("JobState=")), "GONE")

    def wait_for(self, job: str, states: set[str], seconds: float) -> str:
        self.until(lambda: self.state(job) in states, f"{'/'.join(sorted(states))} of job {job}", seconds)
        return self.state(job)


def free_ports(count: int) -> list[int]:
    holders = [socket.socket() for _ in range(count)]
    for holder in holders:
        holder.bind(("127.0.0.1", 0))
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports
