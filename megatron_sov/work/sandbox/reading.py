"""Processes that read files of others: started with nothing but a socket, and enclosed by themselves."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

from megatron_sov.work.sandbox import landlock, seccomp
from megatron_sov.work.sandbox import system_calls as sc
from megatron_sov.work.sandbox.readable import DEVICES, readable_paths
from megatron_sov.work.sandbox.resources import limit

MAX_OPEN_FILES = 256
_ROOT = str(Path(__file__).parents[3])
_CODE = ("import sys, json; sys.path[:] = json.loads(sys.argv[2]); "
         "from {module} import main; main(int(sys.argv[1]))")


def module_path() -> list[str]:
    """Return the folders from which a reading process imports."""
    return [_ROOT, *(entry for entry in map(os.path.abspath, filter(None, sys.path)) if entry != _ROOT)]


def start_reader(module: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a process that runs `main(fd)` of a module; returns it and our end of its socket."""
    ours, theirs = socket.socketpair()
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1",
                   "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system",
                   **{name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE.format(module=module), str(theirs.fileno()),
             json.dumps(module_path())],
            env=environment, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True)
    return process, ours


def enclose_reader(readable: list[str], memory_bytes: int) -> None:
    """Take from this process, for good, what reading needs not: memory without end, writing, the network, and
    where the kernel knows Landlock all files but those of `readable` and the interpreter's."""
    limit(resource.RLIMIT_AS, memory_bytes)
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    version = landlock.abi()
    if version < landlock.NEEDED_ABI or seccomp.supported():
        return
    prefixes = [path for path in {sys.prefix, *readable} if os.path.isdir(path)]
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
    devices = [device for device in DEVICES if os.path.exists(device)]
    landlock.restrict(version, [*readable_paths(prefixes), *devices], [])
    scoped = version >= landlock.SIGNAL_SCOPE_ABI
    seccomp.install(seccomp.prepare(
        seccomp.rules(namespaces=False, signal_scope=scoped, own_pid=os.getpid())))
