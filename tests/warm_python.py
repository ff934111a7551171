"""A Python server that forks in milliseconds, for jobs of the virtual cluster and for commands that start
others; its client is warm_client.py.

To start Python with torch and megatron costs each rank and each look at a node seconds of a core.  Here the
worker of the tests, which has imported all, forks a process that waits at a socket; whatever a job asks
Python for is done in a fork of that one, inside of the asking process's node: its process numbers, host name
and file systems, so that a node's death takes it along.  A keeper outside of the node passes signals on and
kills the fork with all that it has started when the client is gone, as Slurm would.

A job's PYTHONPATH names a copy of the code, of the same bytes: modules that are imported already are not
read from there again, which a job with plain Python shows.
"""

import atexit
import contextlib
import ctypes
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch

from megatron_sov.work.processes.children import die_with_parent

NAMESPACES = {"pid": 0x20000000, "uts": 0x04000000, "mnt": 0x00020000}
"""Namespace of a node -> its flag; the flag of process ids acts on children only."""
SOCKET = "warm.socket"
USED = "used_seconds.txt"
"""A line for each process that has ended: its processor seconds."""


def serve(folder: str) -> NoReturn:
    """Answer requests at the socket in a folder until the process that forked this one ends."""
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    waiting = Path(folder) / "waiting.socket"
    door.bind(str(waiting))
    door.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped automatically
    waiting.rename(Path(folder) / SOCKET)
    here = os.getpid()
    while True:
        client, _ = door.accept()
        if os.fork() == 0:
            door.close()
            die_with_parent(here)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _keep(client, folder)
        client.close()


def _keep(client: socket.socket, folder: str) -> NoReturn:
    """Start a client's request in its node, wait until either ends, and
    write the processor seconds to a file in `folder`."""
    try:
        head, streams, _, _ = socket.recv_fds(client, 8, 3)
        parsed = json.loads(client.recv(int.from_bytes(head, "little"), socket.MSG_WAITALL))
        peer, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        node = {name: os.open(f"/proc/{peer}/ns/{name}", os.O_RDONLY) for name in NAMESPACES}
        _enter(node, "pid")
        child = os.fork()
        if child == 0:
            client.close()
            _be_asked_process(parsed, node, streams)
        for stream in streams:
            os.close(stream)
        code, used_s = _wait(client, child)
        with open(Path(folder) / USED, "a", encoding="utf-8") as used:
            used.write(f"{used_s}\n")
        with contextlib.suppress(OSError):  # it is gone
            client.send(str(code).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _enter(node: dict[str, int], *names: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for name in names:
        if libc.setns(node[name], NAMESPACES[name]):
            raise OSError(ctypes.get_errno(), f"setns {name}")


def _wait(client: socket.socket, child: int) -> tuple[int, float]:
    """Return a child's exit code and processor seconds.  Signals of the client are passed on, and the child
    ends with the client."""
    ended = os.pidfd_open(child)
    while True:
        ready, _, _ = select.select([client, ended], [], [])
        if ended in ready:
            break
        for number in client.recv(64) or [signal.SIGKILL]:
            try:
                os.killpg(child, number)
            except ProcessLookupError:  # it does not lead a group yet
                os.kill(child, number)
    _, status, used = os.wait4(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # as Slurm does with remaining processes of a step
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def _be_asked_process(asked: dict[str, Any], node: dict[str, int], streams: list[int]) -> NoReturn:
    """Become the requested process, and end as Python would."""
    code = 1
    try:
        os.setsid()
        # it ends with its keeper, which is not a process of the node
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _enter(node, "uts", "mnt")
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
        for opened in (*streams, *node.values()):
            os.close(opened)
        os.chdir(asked["folder"])
        os.umask(asked["umask"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.executable = os.environ.get("SOV_TESTS_PYTHON", sys.executable)
        code = _run_module(*asked["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_module(name: str, *arguments: str) -> int:
    """Run `python -m NAME ARGUMENTS`; returns its exit code."""
    sys.argv, sys.orig_argv = [name, *arguments], [sys.executable, "-P", "-m", name, *arguments]
    sys.path[:0] = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (what the worker has read ahead is not ours)
    random.seed()
    if os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    return 0
