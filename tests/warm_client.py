"""A `python` executable for tests that start many processes: forwards the call to a process that has already
imported Megatron-Core (warm_python.py).

It hands over arguments, environment, folder and standard streams, passes on signals, and ends as the fork
ends; when it is killed the fork is killed.  Where that process is not there, or the call is not one of ours,
it becomes Python itself.  Beside this file lies the socket, see warm_python.py.
"""

import json
import os
import signal
import socket
import sys
from typing import Any

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
WARM = ("megatron_sov", "data_prep", "tokenizer", "layout_proof")
"""Packages whose modules are run in a fork."""
COLD = "megatron_sov.work.processes.background"
"""Has to be a child of who starts it."""


def module_asked_for() -> list[str]:
    """Return the module to run and its arguments; None for other command lines."""
    words = sys.argv[2:] if sys.argv[1:2] in (["-P"], ["-u"]) else sys.argv[1:]
    is_ours = words[:1] == ["-m"] and "".join(words[1:2]).partition(".")[0] in WARM and words[1] != COLD
    return words[1:] if is_ours else []


def connected() -> socket.socket | None:
    """Return the way to the process, or None."""
    if not module_asked_for():
        return None
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        door.connect(os.path.join(os.path.dirname(os.path.abspath(__file__)), "warm.socket"))
    except OSError:
        return None
    return door


def main() -> int:
    """Return the exit code, or end by the signal that ended the fork."""
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until they can be passed on
    door = connected()
    if door is None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    mask = os.umask(0o22)
    asked = json.dumps({"arguments": module_asked_for(), "environment": dict(os.environ),
                        "folder": os.getcwd(), "umask": mask}).encode()
    socket.send_fds(door, [len(asked).to_bytes(8, "little")], [0, 1, 2])
    door.sendall(asked)

    def pass_on(number: int, frame: Any) -> None:
        door.send(bytes([number]))

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    ended = door.recv(8)
    if not ended:
        print("the process that has imported megatron is gone", file=sys.stderr)
        return 1
    code = int(ended)
    if code < 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main())
