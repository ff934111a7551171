"""The program in the sandbox that asks a check function about texts; it imports nothing of ours.

From standard input it reads an object with `source`, `texts` and `call_s`.  A process of its own loads the
function anew for each text, so that a verdict does not depend on the texts before it; where that process ends
of itself, another one goes on behind the text.  For each text there is a line [place, verdict, reason, how
the call ended], where the verdict is true, false or null, and the call "ended" or was "slow"; behind one that
did not end there are no more, for such a function is no check.  Lines are written as they come: a call that
waits for something ends with the whole program, by whoever runs it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

MAX_REASON_BYTES = 300
_PR_SET_DUMPABLE = 4


def judge_texts(source: str, texts: list[str], first: int, call_s: float, out: int) -> None:
    """Ask the function about texts from one of them on; runs in a process of its own."""
    # what a check prints must not look like a line of a verdict
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    # compiled and run again for each text: what a function remembers of earlier texts must not count
    for place in range(first, len(texts)):
        signal.setitimer(signal.ITIMER_PROF, call_s)  # of a processor; its signal ends the process
        verdict: Any = None
        try:
            names: dict[str, Any] = {"__name__": "check"}
            exec(compile(source, "check.py", "exec"), names)
            verdict = names["evaluate"](texts[place])
            kind = type(verdict).__name__
            # a truthy text is no verdict: `return "yes"` would accept everything
            reason = "" if isinstance(verdict, bool) else f"gave a {kind}, not True or False"
        # SystemExit too: it ends the call, and not the texts behind it
        except BaseException as e:
            reason = f"{type(e).__name__}: {e}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        line = [place, verdict if isinstance(verdict, bool) else None, reason[:MAX_REASON_BYTES], "ended"]
        os.write(out, json.dumps(line).encode("utf-8", "replace") + b"\n")


def check_line(line: Any, place: int) -> list[Any]:
    """Return a line for a text; raises ValueError where `judge` has not written it."""
    if not isinstance(line, list) or len(line) != 4 or line[0] is True or line[0] != place \
            or not (line[1] is None or isinstance(line[1], bool)) or not isinstance(line[2], str) \
            or line[3] != "ended":
        raise ValueError("is no line of a verdict")
    return line


def write_line(line: list[Any]) -> list[Any]:
    """Write a line to standard output; return it."""
    os.write(1, json.dumps(line).encode() + b"\n")
    return line


def judge_remaining(source: str, texts: list[str], first: int, call_s: float) -> list[list[Any]]:
    """Write and return the lines of the texts from one of them on, up to one at which the process ends."""
    read_end, write_end = os.pipe()
    # a child that crashes takes its own text along; the parent goes on behind it
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            judge_texts(source, texts, first, call_s, write_end)
        finally:
            os._exit(0)
    # held open here, it would keep the pipe from ever ending
    os.close(write_end)
    lines: list[list[Any]] = []
    rest, forged = b"", False
    try:
        # a part of a line stays in `rest` until its end has come
        while first + len(lines) < len(texts) and (part := os.read(read_end, 1 << 16)):
            *complete, rest = (rest + part).split(b"\n")
            for line in complete:
                lines.append(write_line(check_line(json.loads(line), first + len(lines))))
    except (ValueError, RecursionError):  # the function has written there itself
        forged = True
    finally:
        os.close(read_end)
        # killed in any case: a function may have left threads that go on
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    place = first + len(lines)
    if place < len(texts):
        # whoever forges lines is treated as one that did not end: the function is no check
        slow = forged or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF)
        reason = f"did not end within {call_s:g} s" if slow else "ended its process"
        lines.append(write_line([place, None, reason, "slow" if slow else "ended"]))
    return lines


def main() -> None:
    """Judge all texts."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)  # else /proc/PID/fd leads the function to this output
    request = json.loads(sys.stdin.buffer.read())
    lines: list[list[Any]] = []
    texts = request["texts"]
    while len(lines) < len(texts):
        lines += judge_remaining(request["source"], texts, len(lines), request["call_s"])
        if lines[-1][3] != "ended":
            break


if __name__ == "__main__":
    main()
