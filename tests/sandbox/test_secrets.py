"""A program finds nothing of other programs, of its own tests or of the judge, wherever it looks: its memory
page by page, files, descriptors, environment, arguments, and other processes."""

from __future__ import annotations

import re

import pytest

from megatron_sov.judge.rewards.code import CodeReward
from megatron_sov.judge.rewards.reward import judged
from megatron_sov.sandbox.program import Program
from megatron_sov.sandbox.sandbox import SANDBOXES, Sandbox

SEARCH = r'''
import ctypes, gc, os, re, sys
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
PAGE = 4096
found = set()
own = "planted" + str(len("own")) + "own"  # shows that the search finds what is there
def look(data):
    found.update(re.findall(rb"plante[d]\d\w+", data))
def look_at_memory():
    reads, writes = os.pipe()
    anchors = [id(own), id(found), id(sys), ctypes.cast(libc.write, ctypes.c_void_p).value,
               ctypes.addressof(ctypes.c_int()), libc.sbrk(0)]
    near = sorted({anchor >> 24 for anchor in anchors})
    done = set()
    for place in near:
        for block in range(place - 4, place + 5):  # of 16 MiB
            if block in done or block < 0:
                continue
            done.add(block)
            address, end, last = block << 24, (block + 1) << 24, b""
            while address < end:
                # the kernel reads for us, and tells what is not there instead of ending this process
                written = libc.write(writes, address, min(16 * PAGE, end - address))
                if written <= 0:
                    address, last = address + PAGE, b""
                    continue
                data = os.read(reads, written)
                look(last + data)
                last, address = data[-64:], address + written
def look_at_all():
    look_at_memory()
    look(repr([o for o in gc.get_objects() if isinstance(o, (str, bytes, dict, list))]).encode())
    look(repr([os.environ, sys.argv, sys.orig_argv]).encode())
    frame = sys._getframe()
    while frame:
        look(repr([frame.f_locals, frame.f_globals]).encode())
        frame = frame.f_back
    for fd in range(3, 64):
        try:
            os.set_blocking(fd, False)
            look(os.read(fd, 1 << 20))
        except OSError:
            pass
    paths = ["/proc/%s/%s" % (pid, name) for pid in ("self", os.getppid(), 1)
             for name in ("environ", "cmdline", "mem", "maps")]
    for folder in (".", "..", "/tmp", "/dev/shm"):
        try:
            paths += [os.path.join(folder, name) for name in os.listdir(folder)]
            look(repr(paths).encode())
        except OSError:
            pass
    for path in paths:
        try:
            with open(path, "rb") as f:
                look(f.read(1 << 20))
        except OSError:
            pass
    return found
'''


def secrets(text: str) -> set[str]:
    return set(re.findall(r"planted\d\w+", text))


def test_a_program_finds_nothing_of_the_programs_before_it(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch,
                                                           ) -> None:
    monkeypatch.setenv("JUDGES_KEY", "planted1environment")
    for i in range(6):
        sandbox.run(Program(
            f"# planted2source{i}\nopen('planted3made{i}', 'w').write('planted4text{i}')\n"
            f"import sys\nprint('planted5output{i}', input(), file=[sys.stdout, sys.stderr][{i} % 2])\n"
            f"sys.exit('planted6end{i}')",
            stdin=f"planted7input{i}\n", files={f"planted8file{i}": "x" * 5000 + f"planted9text{i}"},
            arguments=(f"planted10argument{i}",)))
    outcome = sandbox.run(Program(SEARCH + "look_at_all(); print(sorted(found))"))
    assert outcome.status == "ok", outcome
    assert secrets(outcome.stdout) == {"planted3own"}


@pytest.mark.parametrize("tests", [
    [{"stdin": "", "stdout": "planted1expected"}] * 2,
    ["assert f(1, [2]) == 'planted1expected'", "assert f('planted2argument', []) == 'planted1expected'"],
    [{"function": "f", "arguments": [0, []], "expected": "planted1expected"}] * 2])
def test_a_solution_finds_nothing_of_its_tests(sandbox: Sandbox, tests: list,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SANDBOXES, (sandbox.enclosure, (), 1), sandbox)
    honest = "def f(x, y):\n    return 'planted1expected'\nprint('planted1expected')"
    cheat = SEARCH + r'''
def f(x, y):
    look_at_all()
    hits = sorted(hit.decode() for hit in found if hit.endswith(b"expected"))
    return hits[0] if hits else len(found)  # and its own
import __main__
if "__file__" in vars(__main__) and "solution" not in __file__:
    print(f(0, 0))
'''
    code = CodeReward(enclosure=sandbox.enclosure, all_or_nothing=False, test_time_s=20)
    assert judged(code, {"response": honest, "tests": tests}).reward == 1.0
    result = judged(code, {"response": cheat, "tests": tests})
    assert (result.status, result.reward) == ("scored", 0.0), result
    assert judged(code, {"response": cheat, "tests": ["assert f(0, 0) == 1"]}).reward == 1.0, "it did look"
