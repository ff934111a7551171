"""A real Slurm cluster on this machine: a controller, and several nodes that tests can kill and freeze.

Daemons run in the foreground as children of this process. Each node has its own process, host name and mount
namespaces, so one SIGKILL ends it with everything that runs on it. The cluster needs root and Debian's
packages (`make slurm`). Its configuration names more cores, memory and GPUs than the machine has.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

CONF = """ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=-1
FirstJobId={first_job}
JobRequeue=1
ReturnToService=1
KillWait=1
SlurmdTimeout=600
SlurmctldTimeout=10
MessageTimeout=100
TCPTimeout=60
BatchStartTimeout=600
CompleteWait=0
MinJobAge=3600
UnkillableStepTimeout=30
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PriorityType=priority/basic
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 \
RealMemory=2000000 Gres=gpu:{gpus}
"""
NAMESPACES = ("unshare", "--pid", "--fork", "--uts", "--mount", "--mount-proc")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "setpriv")
CPUS, GPUS = 224, 8
"""Cores and GPUs of each node in the configuration, as many as the largest shipped profile requests."""
WIDE = 64
"""Number of nodes in the partition `wide`, which are never started, for `sbatch --test-only`."""
PROFILE = """description: virtual nodes
account: ""
time_limit: "30"
signal_lead_s: 60
gpus_per_node: 0
cpus_per_node: 1
"""
"""A cluster profile of these nodes, for commands that submit arrays."""
END_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def find_obstacle() -> str | None:
    """Return the reason why this machine cannot run a cluster, or None."""
    if os.geteuid():
        return "a private Slurm cluster needs root"
    if missing := [name for name in DAEMONS if not shutil.which(name)]:
        return f"not installed: {', '.join(missing)} (make slurm)"
    completed = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, check=False)
    return completed.stderr.strip() or "namespaces are not permitted here" if completed.returncode else None


class VirtualCluster:
    """A Slurm cluster with its files in `folder`: `with VirtualCluster(folder) as cluster`.

    Attributes:
        folder: Configuration, state, logs and sockets.
        partitions: Names of partitions, each with all nodes; the first is the default.
        names: Names of the nodes, n1, n2, ...
        env: Environment variables with which Slurm's programs use this cluster.
    """

    def __init__(self, folder: Path, partitions: tuple[str, ...] = ("batch",), num_nodes: int = 4) -> None:
        self.folder, self.partitions = folder.resolve(), partitions
        self.names = [f"n{i + 1}" for i in range(num_nodes)]
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.env["SLURM_CONF"] = str(self.folder / "etc/slurm.conf")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> VirtualCluster:
        self._write_files()
        run = self.folder / "run"
        try:
            self._daemon("munged", "munged", "-F", "--force", "--num-threads=2",
                         f"--key-file={self.folder}/munge/munge.key", f"--socket={run}/munge.socket",
                         f"--pid-file={run}/munged.pid", f"--seed-file={self.folder}/munge/seed",
                         f"--log-file={self.folder}/log/munged.log")
            until((run / "munge.socket").exists, 600, "munged")
            self._daemon("slurmctld", "slurmctld", "-D", "-c", "-f", self.env["SLURM_CONF"])
            for name in self.names:
                self.start(name)
            self.wait_idle(self.names)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._kill("slurmctld", signal.SIGTERM)  # first: it must not requeue jobs of the dying nodes
        for name in (*self.names, "munged"):
            self._kill(name, signal.SIGKILL)

    def _write_files(self) -> None:
        for name in ("etc", "run", "log", "state", "dev", *(f"spool/{n}" for n in self.names)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for path in (self.folder, self.folder / "run"):
            path.chmod(0o755)
        (self.folder / "munge").mkdir(mode=0o700, exist_ok=True)
        for i in range(GPUS):
            (self.folder / f"dev/nvidia{i}").touch()
        port = _free_ports(len(self.names) + 1)
        conf = CONF.format(folder=self.folder, host=socket.gethostname().split(".")[0], port=port, cpus=CPUS,
                           gpus=GPUS,
                           # ranks meet at a port made from it; clusters share a host
                           first_job=random.randrange(1, 1_000_000))
        conf += "".join(f"NodeName={n} NodeHostname={n} NodeAddr=127.0.0.1 Port={port + i}\n"
                        for i, n in enumerate(self.names, 1))
        conf += f"NodeName=w[1-{WIDE}] NodeAddr=127.0.0.1 Port={port} State=CLOUD\n"
        nodes = {**dict.fromkeys(self.partitions, ",".join(self.names)), "wide": f"w[1-{WIDE}]"}
        conf += "".join(f"PartitionName={p} Nodes={n} Default={'YES' if i == 0 else 'NO'} MaxTime=UNLIMITED "
                        "DefaultTime=10\n" for i, (p, n) in enumerate(nodes.items()))
        (self.folder / "etc/slurm.conf").write_text(conf)
        (self.folder / "etc/gres.conf").write_text(f"Name=gpu File={self.folder}/dev/nvidia[0-{GPUS - 1}]\n")
        (self.folder / "etc/cgroup.conf").write_text("CgroupAutomount=no\n")
        (self.folder / "etc/hosts").write_text(Path("/etc/hosts").read_text()
                                               + "".join(f"127.0.0.1 {n}\n" for n in self.names))
        key = self.folder / "munge/munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    # nodes

    def start(self, node: str) -> None:
        """Start a node's daemon."""
        begin = f'hostname {node}; mount --bind "{self.folder}/etc/hosts" /etc/hosts'
        self._daemon(node, *NAMESPACES, "--kill-child", "bash", "-c",
                     f'{begin}; exec slurmd -D -N {node} -f "$SLURM_CONF"')

    def crash(self, node: str) -> None:
        """Kill a node and report it to the controller, which would notice only after half a minute."""
        self._kill(node, signal.SIGKILL)
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=crash")

    def freeze(self, node: str) -> None:
        """Suspend all processes of a node. The controller is not told."""
        for process in self.processes(node):
            process.suspend()

    def resume(self, node: str) -> None:
        """Restart a dead or frozen node and wait until it is idle."""
        self._kill(node, signal.SIGKILL)
        self.start(node)
        self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        self.wait_idle([node])

    def processes(self, node: str) -> list[psutil.Process]:
        """Return the processes of a node, its daemon first."""
        return psutil.Process(self._daemons[node].pid).children(recursive=True)

    def ranks(self, node: str) -> list[psutil.Process]:
        """Return the training processes of a node."""
        return [process for process in self.processes(node)
                if process.name().startswith("python") and "--resume" in process.cmdline()]

    def in_node(self, node: str, *command: str) -> None:
        """Run a command in a node's own view of the file systems."""
        slurmd = self.processes(node)[0].pid
        subprocess.run(["nsenter", f"--target={slurmd}", "--mount", *command], check=True)

    # jobs

    def run(self, *command: str, check: bool = True, **options: Any) -> str:
        """Run a Slurm client program, and return its output."""
        completed = subprocess.run(command, env=self.env, text=True, capture_output=True, timeout=600,
                                   check=False, **options)
        assert not (check and completed.returncode), (command, completed.stdout, completed.stderr)
        return completed.stdout.strip()

    def sbatch(self, *arguments: str, **options: Any) -> str:
        """Submit a script; returns the job's number."""
        return self.run("sbatch", "--parsable", *arguments, **options).split(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """Return the controller's record of a job; asks again if the controller times out."""
        for _ in range(600):
            result = dict(re.findall(r"(\w+)=(\S*)",
                                     self.run("scontrol", "-o", "show", "job", number, check=False)))
            if "JobState" in result:
                return result
            time.sleep(0.5)
        raise TimeoutError(f"job {number}: the controller does not answer")

    def wait(self, number: str, states: tuple[str, ...] = END_STATES,
             timeout_s: float = 600) -> dict[str, str]:
        """Wait until a job is in one of the states; return the controller's record."""
        try:
            until(lambda: self.job(number)["JobState"] in states, timeout_s, f"job {number}: {states}")
        except TimeoutError as e:
            nodes = self.run("sinfo", "-h", "-N", "-p", self.partitions[0], "-o", "%N %T %E", check=False)
            log = (self.folder / "log/slurmctld.log").read_text()[-3000:]
            raise TimeoutError(f"{e}: {self.job(number)}; {nodes}; {log}") from e
        return self.job(number)

    def wait_idle(self, nodes: list[str]) -> None:
        """Wait until the nodes can take jobs."""
        def idle() -> bool:
            lines = self.run("sinfo", "-h", "-N", "-p", self.partitions[0], "-n", ",".join(nodes), "-o",
                             "%N %t", check=False)
            return {tuple(line.split()) for line in lines.splitlines()} == {(n, "idle") for n in nodes}

        until(idle, 600, f"idle: {nodes}")

    # daemons

    def _daemon(self, name: str, *command: str) -> None:
        with open(self.folder / f"log/{name}.out", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],  # daemons end with a killed test run
                env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def _kill(self, name: str, number: int) -> None:
        process = self._daemons.pop(name, None)
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(number)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait until `condition()` is true; after `timeout_s`, raise an error that says `what` did not occur."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.25)


def _free_ports(count: int) -> int:
    """Return the first of `count` free ports, below the ports of ranks and the system's ephemeral ports."""
    for _ in range(200):
        first = random.randrange(12000, 20000 - count)
        try:
            for port in range(first, first + count):
                with socket.socket() as s:
                    s.bind(("0.0.0.0", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no free ports")
