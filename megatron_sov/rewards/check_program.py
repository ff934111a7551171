"""The program in the sandbox that asks a check function about texts; it imports nothing of ours.

From standard input it reads an object with `source`, `texts` and `call_s`.  Each text is judged in a process
of its own, forked before the function is loaded: what the function keeps for itself is gone with it, and a
text's verdict does not depend on the others.  For each text it writes a line [place, verdict, reason, whether
the call ended], where the verdict is true, false or null; behind a call that did not end it stops, for such a
function is no check.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any

PATIENCE = 3
"""A call that waits has so many times its time by the clock."""
MAX_REASON_BYTES = 300
_PR_SET_DUMPABLE = 4


def be_judge(source: str, text: str, call_s: float, out: int) -> None:
    """Load the function, ask it, and write verdict and reason; runs in a process of its own."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    seconds = max(1, round(call_s))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    verdict: Any = None
    try:
        names: dict[str, Any] = {"__name__": "check"}
        exec(compile(source, "check.py", "exec"), names)
        verdict = names["evaluate"](text)
        reason = "" if isinstance(verdict, bool) else f"gave a {type(verdict).__name__}, not True or False"
    except BaseException as e:
        reason = f"{type(e).__name__}: {e}"
    told = [verdict if isinstance(verdict, bool) else None, reason[:MAX_REASON_BYTES]]
    os.write(out, json.dumps(told).encode("utf-8", "replace"))


def judged(source: str, text: str, call_s: float) -> tuple[list[Any], bool]:
    """Return [verdict, reason] of a text, and whether the call ended."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            be_judge(source, text, call_s, write_end)
        finally:
            os._exit(0)
    os.close(write_end)
    try:
        end_s, said = time.monotonic() + PATIENCE * call_s, b""
        while len(said) < 1 << 16:
            ready, _, _ = select.select([read_end], [], [], max(0.0, end_s - time.monotonic()))
            part = os.read(read_end, 1 << 16) if ready else b""
            if not part:
                break
            said += part
        waited = not said and time.monotonic() >= end_s
    finally:
        os.close(read_end)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    if not said and (waited or late):
        return [None, f"did not end within {call_s:g} s"], False
    try:
        verdict, reason = json.loads(said)
    except ValueError:
        return [None, "ended its process"], True
    return [verdict if isinstance(verdict, bool) else None, str(reason)[:MAX_REASON_BYTES]], True


def main() -> None:
    """Judge all texts."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)  # else /proc/PID/fd leads the function to this output
    request = json.loads(sys.stdin.buffer.read())
    verdicts = os.dup(1)
    for place, text in enumerate(request["texts"]):
        told, ended = judged(request["source"], text, request["call_s"])
        os.write(verdicts, json.dumps([place, *told, ended]).encode() + b"\n")
        if not ended:
            break


if __name__ == "__main__":
    main()
