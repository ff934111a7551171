"""Sandboxed program that applies a check function to texts; imports nothing from this package.

Standard input is a JSON object with `source`, `texts` and `call_s`. A child process loads the function anew
for each text, so that verdicts do not depend on earlier texts. If the child exits, another child continues
with the next text. The output has a line [index, verdict, reason, state] per text: verdict true, false or
null, and state "ended" or "slow". After a slow call the program stops. Lines are written at once, because a
call that waits forever ends with the whole program.
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
    """Apply the function to `texts[first:]` in a child process."""
    # Prints from a check must not look like verdict lines.
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    # Compile and run again for each text, so that state from earlier texts does not count.
    for place in range(first, len(texts)):
        signal.setitimer(signal.ITIMER_PROF, call_s)  # processor time; the signal ends the process
        verdict: Any = None
        try:
            names: dict[str, Any] = {"__name__": "check"}
            exec(compile(source, "check.py", "exec"), names)
            verdict = names["evaluate"](texts[place])
            kind = type(verdict).__name__
            # A truthy text is not a verdict: `return "yes"` would accept everything.
            reason = "" if isinstance(verdict, bool) else f"gave a {kind}, not True or False"
        # SystemExit too: only this call ends.
        except BaseException as e:
            reason = f"{type(e).__name__}: {e}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        line = [place, verdict if isinstance(verdict, bool) else None, reason[:MAX_REASON_BYTES], "ended"]
        os.write(out, json.dumps(line).encode("utf-8", "replace") + b"\n")


def check_line(line: Any, place: int) -> list[Any]:
    """Return a line for the text `place`; raises ValueError for a line from another source than
    `judge_texts`."""
    if not isinstance(line, list) or len(line) != 4 or line[0] is True or line[0] != place \
            or not (line[1] is None or isinstance(line[1], bool)) or not isinstance(line[2], str) \
            or line[3] != "ended":
        raise ValueError("is no line of a verdict")
    return line


def write_line(line: list[Any]) -> list[Any]:
    """Write a line to standard output and return the line."""
    os.write(1, json.dumps(line).encode() + b"\n")
    return line


def judge_remaining(source: str, texts: list[str], first: int, call_s: float) -> list[list[Any]]:
    """Write and return lines for `texts[first:]` until the child process ends."""
    read_end, write_end = os.pipe()
    # A crashing child loses only its current text.
    child = os.fork()
    if child == 0:
        try:
            os.close(read_end)
            judge_texts(source, texts, first, call_s, write_end)
        finally:
            os._exit(0)
    # An open write end in the parent would keep the pipe from closing.
    os.close(write_end)
    lines: list[list[Any]] = []
    rest, forged = b"", False
    try:
        # `rest` holds an incomplete line.
        while first + len(lines) < len(texts) and (part := os.read(read_end, 1 << 16)):
            *complete, rest = (rest + part).split(b"\n")
            for line in complete:
                lines.append(write_line(check_line(json.loads(line), first + len(lines))))
    except (ValueError, RecursionError):  # the function wrote to the pipe
        forged = True
    finally:
        os.close(read_end)
        # Kill in any case, because the function may have left threads.
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    place = first + len(lines)
    if place < len(texts):
        # Forged lines count as a slow call, so that the function is rejected.
        slow = forged or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF)
        reason = f"did not end within {call_s:g} s" if slow else "ended its process"
        lines.append(write_line([place, None, reason, "slow" if slow else "ended"]))
    return lines


def main() -> None:
    """Read the request and judge all texts."""
    # Otherwise the function could open this output through /proc/PID/fd.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)
    request = json.loads(sys.stdin.buffer.read())
    lines: list[list[Any]] = []
    texts = request["texts"]
    while len(lines) < len(texts):
        lines += judge_remaining(request["source"], texts, len(lines), request["call_s"])
        if lines[-1][3] != "ended":
            break


if __name__ == "__main__":
    main()
