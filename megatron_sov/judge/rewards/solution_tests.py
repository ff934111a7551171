"""Sandboxed program that tests a solution; sent as text together with the two modules imported below.

The program forks the solution process before it reads the tests, so the tests are nowhere in that process.
The two processes exchange plain data over a socket pair; other objects are used through proxies. A solution
sees the arguments of its calls but not the expected results, and cannot forge a verdict by printing,
overwriting or exiting.
"""

from __future__ import annotations

import builtins
import ctypes
import functools
import importlib
import json
import os
import socket
import sys
import traceback
import types
from typing import Any

from megatron_sov.judge.rewards.solution_frameworks import TestText, guard_numpy, is_close, make_pytest
from megatron_sov.judge.rewards.solution_peer import BUILT_IN_ERRORS, Peer, SolutionEnded

SHARED_MODULES = (
    "bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools",
    "json", "math", "numpy", "operator", "random", "re", "statistics", "string", "typing",
)
"""Modules that solution and tests import separately."""
TEST_MODULES = ("np", "numpy", "pytest", "unittest")
"""Names that only the tests' own modules provide, because a solution's versions could decide equality."""
_PR_SET_DUMPABLE = 4


def run_solution(source: str, channel: socket.socket) -> None:
    """Run a solution, describe its names, and answer requests."""
    peer = Peer(channel, trusts=True)
    main = types.ModuleType("__main__")
    # Classes from the solution have `__module__` "__main__", which `_run_operation` checks.
    sys.modules["__main__"] = main
    try:
        exec(compile(source, "solution.py", "exec"), main.__dict__)
    except BaseException as e:
        peer.send({"error": "".join(traceback.format_exception_only(type(e), e)).strip()[-500:]})
        return
    # The test side rebuilds names from descriptions and runs no solution code.
    names: dict[str, list[Any]] = {}
    for name, value in list(vars(main).items()):
        if name.startswith("__"):
            continue
        if isinstance(value, types.ModuleType):
            names[name] = ["module", value.__name__]
        # Each side uses its own math.gcd.
        elif getattr(value, "__module__", None) in SHARED_MODULES and isinstance(
                getattr(value, "__name__", None), str):
            names[name] = ["shared", [value.__module__, value.__name__]]
        elif isinstance(value, type) and issubclass(value, Exception):
            names[name] = ["error class", [kind.__name__ for kind in value.__mro__]]
        else:
            try:
                names[name] = ["value", peer.encode_value(value)]
            except Exception:  # contains itself, for example
                continue
    peer.send(names)
    peer.serve()


def build_names(descriptions: dict[str, list[Any]], peer: Peer) -> dict[str, Any]:
    """Rebuild a solution's names for the tests, excluding names that decide comparisons."""
    names: dict[str, Any] = {}
    for name, (kind, content) in descriptions.items():
        # Builtins such as abs or set, and import settings, must not come from the solution.
        if hasattr(builtins, name) or name.startswith("__"):
            continue
        if name in SHARED_MODULES and name not in TEST_MODULES:
            names[name] = importlib.import_module(name)
        elif kind == "module" and content in SHARED_MODULES:
            names[name] = importlib.import_module(content)
        elif kind == "shared" and content[0] in SHARED_MODULES:
            if (value := getattr(importlib.import_module(content[0]), content[1], None)) is not None:
                names[name] = value
        elif name in TEST_MODULES:
            continue
        elif kind == "error class":
            base = next((BUILT_IN_ERRORS[base] for base in content if base in BUILT_IN_ERRORS), Exception)
            names[name] = peer.errors[content[0]] = type(content[0], (base,), {})
        elif kind == "value":
            names[name] = peer.decode_value(content)
    return names


def to_plain_data(value: Any) -> Any:
    """Convert tuples and arrays to lists, as in JSON."""
    value = value.tolist() if type(value).__module__ == "numpy" else value
    if isinstance(value, (list, tuple)):
        return [to_plain_data(item) for item in value]
    return {key: to_plain_data(item) for key, item in value.items()} if isinstance(value, dict) else value


def read_exactly(length: int) -> bytes:
    """Read exactly `length` bytes from standard input."""
    parts = []
    while length and (part := os.read(0, length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def write_verdict(fd: int, **what: Any) -> None:
    os.write(fd, json.dumps(what).encode() + b"\n")


def main() -> None:
    """Read a solution, fork its process, read the tests, and run them."""
    # Integers are exchanged as decimal text, which Python limits to 4,300 digits by default.
    sys.set_int_max_str_digits(0)
    # Unbuffered, because a buffer would hold the tests in memory before the fork.
    source = read_exactly(int(read_exactly(12))).decode()
    # Otherwise the solution could open input and verdicts through /proc/PID/fd.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)
    test_channel, solution_channel = socket.socketpair()
    if os.fork() == 0:
        test_channel.close()
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nothing, fd)
        try:
            run_solution(source, solution_channel)
        finally:
            os._exit(0)
    solution_channel.close()
    # Otherwise the tests could import a file json.py from the working folder.
    sys.path[:] = [p for p in sys.path if os.path.realpath(p) != os.getcwd()]  # the solution can write there
    # Verdicts go to a copy of stdout that tests cannot print to.
    verdict = os.dup(1)
    os.dup2(2, 1)  # prints from tests are not verdicts
    request = json.loads(read_exactly(int(read_exactly(12))))
    peer = Peer(test_channel, trusts=False)
    try:
        descriptions = peer.receive()
        if isinstance(descriptions.get("error"), str):
            write_verdict(verdict, loaded=False, reason=descriptions["error"])
            return
        names = build_names(descriptions, peer)
    except (Exception, SolutionEnded) as e:
        write_verdict(verdict, loaded=False, reason=f"{type(e).__name__}: {e}")
        return
    run_tests(request, names, peer, verdict)


def run_tests(request: dict[str, Any], names: dict[str, Any], peer: Peer, verdict: int) -> None:
    """Run tests and write a line per test.

    Args:
        request: `tests`, `entry_point` and `tolerance`.
        names: the solution's names.
        peer: connection to the solution.
        verdict: output file descriptor. The first test that fails before using the solution, or on a missing
            module, has its error as `fault`.
    """
    solution = types.ModuleType("solution")
    solution.__dict__.update(names)
    sys.modules.update(solution=solution, pytest=make_pytest())
    if any("numpy" in text for text in request["tests"]) or not {"np", "numpy"}.isdisjoint(names):
        guard_numpy()
    tolerance = request["tolerance"]
    close = functools.partial(is_close, relative=tolerance, absolute=tolerance, exact_integers=True)
    names |= {"__name__": "__main__", "__file__": "test.py",
              "__same__": lambda actual, expected: close(to_plain_data(actual), expected)}
    failed = faulty = False
    for index, text in enumerate(request["tests"]):
        num_uses = peer.num_uses
        try:
            TestText(text, names, request["entry_point"]).run()
            write_verdict(verdict, test=index, passed=True)
        except (Exception, SystemExit, SolutionEnded) as e:
            error = f"{type(e).__name__}: {e}"[:300]
            # A TypeError may come from `LIMIT + 1` if the solution defines another LIMIT.
            unused = peer.num_uses == num_uses and not isinstance(e, TypeError)
            is_fault = unused or isinstance(e, ImportError)
            # Only the first reasons, because thousands would exceed the output limit.
            write_verdict(verdict, test=index, passed=False, **({} if failed else {"reason": error}),
                          **({"fault": error} if is_fault and not faulty else {}))
            failed, faulty = True, faulty or is_fault
    write_verdict(verdict, done=True)


if __name__ == "__main__":
    main()
