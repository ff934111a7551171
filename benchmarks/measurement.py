"""Describe the machine of a benchmark, and measure the processor time, wall time and memory of commands and
copies."""

import os
import platform
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_sov.base.digests import hash_file
from megatron_sov.runs.launch_environment import read_processor_name

SAMPLE_EVERY_S = 0.2
"""Interval between samples of the memory of a process tree."""


@dataclass(frozen=True)
class Cost:
    """Processor time, wall time and memory of a command."""

    cpu_s: float
    """User and system time of the command and all its child processes."""
    wall_s: float
    peak_bytes: int
    """Peak resident memory of the largest process; with `sum_memory`, of all processes together."""


def run_measured(command: Sequence[str | Path], environment: Mapping[str, str] = os.environ,
                 sum_memory: bool = False) -> Cost:
    """Run a command to its end and return its cost.

    Args:
        command: program and arguments.
        environment: environment variables of the command.
        sum_memory: sample the memory of the process tree; the system records only the largest process.

    Raises:
        SystemExit: the command failed; the message has the end of its output.
    """
    with tempfile.TemporaryFile() as output:
        begin_s, tree_bytes, has_ended = time.monotonic(), [0], threading.Event()
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

        def sample_memory() -> None:
            while not has_ended.wait(SAMPLE_EVERY_S):
                try:
                    parent = psutil.Process(process.pid)
                    tree = [parent, *parent.children(recursive=True)]
                    tree_bytes.append(sum(member.memory_info().rss for member in tree))
                except psutil.NoSuchProcess:
                    continue

        if sum_memory:
            threading.Thread(target=sample_memory, daemon=True).start()
        try:
            cost = await_cost(process, begin_s)
        except SystemExit as e:
            output.seek(0)
            raise SystemExit(f"{e}\n{output.read().decode(errors='replace')[-2000:]}") from None
        finally:
            has_ended.set()
    return Cost(cost.cpu_s, cost.wall_s, max(cost.peak_bytes, *tree_bytes))


def await_cost(process: subprocess.Popen[bytes], begin_s: float) -> Cost:
    """Wait for the end of a process that was started at `time.monotonic() == begin_s`; return its cost.

    Raises:
        SystemExit: the process failed.
    """
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{process.args!r}: exit code {process.returncode}")
    return Cost(usage.ru_utime + usage.ru_stime, time.monotonic() - begin_s, usage.ru_maxrss * 1024)


def measure_action(action: Callable[[], object]) -> Cost:
    """Call a function, and return its cost with its child processes; the memory is the peak so far."""
    begin_s, begin_cpu_s = time.monotonic(), time.process_time() + read_child_cpu_s()
    action()
    cpu_s = time.process_time() + read_child_cpu_s() - begin_cpu_s
    return Cost(cpu_s, time.monotonic() - begin_s, read_peak_bytes())


COPIES = ("cp", "cp + fsync", "cp + fsync + blake3", "cp + fsync + openssl")
"""Ways to copy a folder, as peers of commands that write and hash files."""


def copy_folder(source: Path, target: Path, name: str) -> None:
    """Copy a folder by `cp`, then sync and hash every file if `name` (of `COPIES`) contains these steps."""
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    files = [p for p in target.rglob("*") if p.is_file()]
    for file in files if "fsync" in name else ():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    for file in files if "blake3" in name else ():
        hash_file(file)
    if "openssl" in name:
        subprocess.run(["openssl", "dgst", "-sha256", *map(str, files)], check=True,
                       stdout=subprocess.DEVNULL)


def read_child_cpu_s() -> float:
    """Return the processor seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def read_peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_machine() -> str:
    """Return processor, cores, load and Python, for the first line of a benchmark's output."""
    return (f"{read_processor_name()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, "
            f"Python {platform.python_version()}")
