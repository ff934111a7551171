"""Outcomes of programs in a sandbox, failures of the sandbox's own processes, and resource limits."""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.sandbox import restrictions
from megatron_sov.sandbox.enclosures import EnclosureUnavailable
from megatron_sov.sandbox.folders import MAX_ENTRIES, measure_folder, remove_folder
from megatron_sov.sandbox.program import Limits, Outcome, Program
from megatron_sov.sandbox.sandbox import Sandbox, Worker
from tests.pages_typed import blocks, page_section


def test_a_program_reads_writes_and_exits_as_outside_the_sandbox(sandbox: Sandbox) -> None:
    outcome = sandbox.run(Program(
        "import sys, part.other\nprint(input(), open('data/x.txt').read(), sys.argv, part.other.VALUE)\n"
        "print('oh', file=sys.stderr)\nsys.exit(3)",
        stdin="given\n", files={"data/x.txt": "읽다", "part/other.py": "VALUE = 7"}))
    assert (outcome.status, outcome.exit_code) == ("error", 3)
    assert outcome.stdout == "given 읽다 ['program.py'] 7\n"
    assert outcome.stderr == "oh\n" and outcome.reason == "exit code 3: oh"


def test_errors_are_reported_like_in_an_interpreter(sandbox: Sandbox) -> None:
    outcome = sandbox.run(Program("def f():\n    1 / 0\nf()"))
    assert outcome.exit_code == 1 and outcome.reason == "exit code 1: ZeroDivisionError: division by zero"
    assert outcome.stderr.startswith('Traceback (most recent call last):\n  File "')
    assert "line 2, in f\n    1 / 0" in outcome.stderr and "megatron_sov/sandbox" not in outcome.stderr
    absent = sandbox.run(Program("def f():\n    open('absent')\nf()"))
    assert absent.stderr.splitlines()[-2:] == [
        "    open('absent')", "FileNotFoundError: [Errno 2] No such file or directory: 'absent'"]
    assert sandbox.run(Program("def")).reason == "exit code 1: SyntaxError: invalid syntax"


@pytest.mark.parametrize("code, exit_code", [
    ("None", 0), ("0", 0), ("False", 0), ("3", 3), ("-1", 255), ("256", 255), ("2 ** 70", 255), ("-512", 255),
    ("2 ** 70 + 7", 255), ("2 ** 40 + 7", 7), ("'why'", 1), ("(0,)", 1), ("0.0", 1)])
def test_a_nonzero_exit_code_is_a_failure(sandbox: Sandbox, code: str, exit_code: int) -> None:
    assert sandbox.run(Program(f"raise SystemExit({code})")).exit_code == exit_code


def test_threads_and_exit_functions_end_with_complete_output(sandbox: Sandbox) -> None:
    outcome = sandbox.run(Program(
        "import atexit, threading, time\natexit.register(lambda: print('last'))\nsaid = threading.Event()\n"
        "threading.Thread(target=lambda: (said.wait(), time.sleep(0.05), print('thread'))).start()\n"
        "print('x' * 300000)\nsaid.set()"))
    assert outcome.status == "ok" and outcome.stdout == "x" * 300000 + "\nthread\nlast\n"


def test_each_program_starts_in_an_empty_folder(sandbox: Sandbox) -> None:
    for _ in range(2):
        outcome = sandbox.run(Program("import os; print(os.listdir('.')); open('left', 'w').write('x')"))
        assert outcome.stdout == "['program.py']\n"


@pytest.mark.parametrize("program, problem", [
    (Program("", files={"../x": ""}), "'../x' must be a relative path"),
    (Program("", files={"/etc/x": ""}), "'/etc/x' must be a relative path"),
    (Program("\ud800"), "half of a surrogate pair"),
    (Program("", stdin=b"x"), "stdin is of type bytes"),  # type: ignore[arg-type]
])
def test_invalid_programs_are_refused(program: Program, problem: str) -> None:
    assert problem in program.find_problem()


def test_a_program_longer_than_the_limit_is_refused() -> None:
    assert "17,825,792 bytes" in Program("x" * (17 << 20)).find_problem()


def test_outcomes_come_in_order_from_several_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(2, timeout=600)

    def run(self: Worker, *arguments: Any, original_run: Any = Worker.run) -> Outcome:
        barrier.wait()  # passes only if two workers run at the same time
        outcome: Outcome = original_run(self, *arguments)
        return outcome

    with Sandbox(workers=2) as sandbox, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(Worker, "run", run)
        outcomes = list(pool.map(sandbox.run, [Program(f"print({i})") for i in range(4)]))
    assert [outcome.stdout for outcome in outcomes] == ["0\n", "1\n", "2\n", "3\n"]


def test_a_dead_server_gives_no_verdict_and_is_replaced(sandbox: Sandbox, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = psutil.Process().children()
    with Sandbox(enclosure=sandbox.enclosure) as own:
        (server,) = set(psutil.Process().children()) - set(before)
        server.kill()
        outcome = own.run(Program("print(1)"))
        assert outcome.status == "infrastructure" and "server failed" in outcome.reason
        assert own.run(Program("print(1)")).stdout == "1\n"
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="has been closed"):
        own.run(Program("print(1)"))


def test_a_killed_owner_leaves_no_processes_or_folders(sandbox: Sandbox, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        tempfile.tempdir = str(tmp_path)
        with Sandbox(enclosure=sandbox.enclosure) as own:
            children = [child.pid for child in psutil.Process().children(recursive=True)]
            os.write(write_end, f"{children}\n".encode())
            own.run(Program("import time; time.sleep(600)"), Limits(wall_s=600))
        os._exit(0)
    servers = [psutil.Process(child) for child in eval(os.read(read_end, 1000))]
    assert servers
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    _, alive = psutil.wait_procs(servers, timeout=600)
    assert not alive and not list(tmp_path.iterdir())


def test_unenforceable_settings_are_named_together() -> None:
    with pytest.raises(UserError) as raised:
        Sandbox(Limits(wall_s=float("inf"), files=2), enclosure="jail", workers=0)
    assert all(part in str(raised.value) for part in (
        "4 problems", "wall_s = inf", "files = 2", "enclosure = 'jail'", "workers = 0"))
    with pytest.raises(UserError, match="'no-such-jail' is not installed"):
        Sandbox(command=("no-such-jail",))


def test_a_machine_without_an_enclosure_is_an_honest_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: Worker) -> None:
        raise EnclosureUnavailable("not allowed here")

    monkeypatch.setattr(Worker, "start", start)
    with pytest.raises(UserError) as raised:
        Sandbox()
    assert "cannot enclose a program: 2 problems; allow one of them" in str(raised.value)
    assert "  landlock: not allowed here" in str(raised.value)


def test_a_user_command_can_enclose_programs(tmp_path: Path) -> None:
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\necho "in $1" > "$1/note"\nexec {sys.executable} -S "$3"\n')
    wrapper.chmod(0o755)
    with Sandbox(Limits(wall_s=20), command=(str(wrapper), "{folder}")) as sandbox:
        assert sandbox.enclosure == "command"
        outcome = sandbox.run(Program("print(input(), open('note').read())", "x\n"))
        assert outcome.stdout.startswith("x in ") and outcome.status == "ok"
        folder = outcome.stdout.split()[2]
        assert not Path(folder).exists()
        waits = Program("from subprocess import Popen; Popen(['sleep', '60']); Popen(['sleep', '60']).wait()")
        assert sandbox.run(waits, Limits(wall_s=0.3)).status == "timeout"
        assert sandbox.run(Program("while True: print('yes')")).status == "output"
        wrapper.unlink()
        assert sandbox.run(Program("")).status == "infrastructure"


def test_commands_of_the_page_run(capfd: pytest.CaptureFixture[str]) -> None:
    for block in blocks(page_section("tools.md", "The sandbox"), "python"):
        exec(block, names := {**globals()})
    assert names["bubblewrap"][0] == "bwrap"
    lines = capfd.readouterr().out.splitlines()
    assert lines[1] == "ok 0 42"
    assert "error exit code 1: ZeroDivisionError: division by zero" in lines


NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder below /tmp. A test as root continues as its owner "nobody", since root can read any folder."""
    path = Path(tempfile.mkdtemp(prefix="folders-", dir="/tmp"))
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(path, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield path
    finally:
        if is_root:
            os.seteuid(0)
        shutil.rmtree(path, ignore_errors=True)


def test_folders_deeper_than_path_max_are_counted(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("n" * 255, dir_fd=fd)
        inner = os.open("n" * 255, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    with open(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd), "wb") as f:
        f.write(bytes(1 << 16))
    os.close(fd)
    (folder / "link").symlink_to("/usr")
    num_bytes, num_entries = measure_folder(str(folder))
    assert num_bytes >= 1 << 16 and num_entries == 30 + 2  # folders, the file and the link
    remove_folder(str(folder))
    assert not folder.exists()


@pytest.mark.parametrize("mode", [0o000, 0o300, 0o500])
def test_unreadable_folders_count_as_full_and_are_removed(folder: Path, mode: int) -> None:
    (folder / "outer" / "closed").mkdir(parents=True)
    (folder / "outer" / "closed" / "file").write_text("x")
    (folder / "outer" / "closed").chmod(mode)
    assert (measure_folder(str(folder))[1] == MAX_ENTRIES) == (mode != 0o500)
    remove_folder(str(folder))
    assert not folder.exists()


HONEST_PROGRAMS = [
    ("print(sum(range(100)))", "4950"),
    ("print(2 ** 1000 % 1007)", str(2 ** 1000 % 1007)),
    ("a, b = map(int, input().split()); print(a + b)", "7"),
    ("import sys; print(len(sys.stdin.read()))", "4"),
    ("print(sum(map(int, open('/dev/stdin').read().split())))", "7"),
    ("from pathlib import Path; print(Path('/dev/stdin').read_text(), file=open('/dev/stdout', 'w'))", "3 4"),
    ("from collections import Counter; print(Counter('banana').most_common(1))", "[('a', 3)]"),
    ("import heapq; h = [3, 1, 2]; heapq.heapify(h); print(heapq.heappop(h))", "1"),
    ("import math; print(math.comb(10, 3), f'{math.pi:.3f}')", "120 3.142"),
    ("import re; print(re.findall(r'\\d+', 'a1b22'))", "['1', '22']"),
    ("import json; print(json.dumps({'b': [1, None], 'a': True}))", '{"b": [1, null], "a": true}'),
    ("import itertools; print(len(list(itertools.permutations(range(6)))))", "720"),
    ("from functools import lru_cache\n@lru_cache(None)\ndef f(n): return n if n < 2 else f(n-1) + f(n-2)\n"
     "print(f(200))", "280571172992510140037611932413038677189525"),
    ("import sys; sys.setrecursionlimit(9000)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(8000))", "8000"),
    ("from datetime import date; print(date(2024, 2, 29).isoformat())", "2024-02-29"),
    ("from fractions import Fraction as F; print(F(1, 3) + F(1, 6))", "1/2"),
    ("from decimal import Decimal; print(Decimal('0.1') * 3)", "0.3"),
    ("with open('x.txt', 'w') as f: f.write('한국어')\nprint(open('x.txt').read())", "한국어"),
    ("import tempfile, os\nwith tempfile.TemporaryDirectory() as d:\n    open(d + '/x', 'w').close()\n"
     "    print(os.listdir(d))", "['x']"),
    ("import shutil, os\nopen('a', 'w').write('x')\nshutil.copy('a', 'b'); shutil.copytree('.', 'd')\n"
     "shutil.rmtree('d'); print(open('b').read())", "x"),
    ("import subprocess, sys; print(subprocess.run(['sh', '-c', 'echo $((6 * 7))'], capture_output=True,"
     " text=True).stdout.strip())", "42"),
    ("import threading\nfound = []\n"
     "ts = [threading.Thread(target=found.append, args=(i,)) for i in range(8)]\n"
     "[t.start() for t in ts]; [t.join() for t in ts]; print(sorted(found))", "[0, 1, 2, 3, 4, 5, 6, 7]"),
    ("from concurrent.futures import ThreadPoolExecutor as P\nwith P(4) as p:\n"
     "    print(list(p.map(lambda x: x * x, range(5))))", "[0, 1, 4, 9, 16]"),
    ("import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    return 5\nprint(asyncio.run(f()))",
     "5"),
    ("import os\nr, w = os.pipe()\nif os.fork() == 0:\n    os.write(w, b'child'); os._exit(0)\nos.wait()\n"
     "print(os.read(r, 9).decode())", "child"),
    ("import sqlite3; c = sqlite3.connect('x.db'); c.execute('create table t (a)')\n"
     "c.execute('insert into t values (3)'); c.commit(); print(c.execute('select * from t').fetchall())",
     "[(3,)]"),
    ("import random; random.seed(1); print(random.randint(1, 10 ** 6))", "140892"),
    ("import hashlib, zlib, base64; print(hashlib.sha256(b'x').hexdigest()[:8], zlib.crc32(b'x'), "
     "base64.b64encode(b'x').decode())", "2d711642 2363233923 eA=="),
    ("import pickle; print(pickle.loads(pickle.dumps({'a': (1, 2)})))", "{'a': (1, 2)}"),
    ("import signal\nsignal.signal(signal.SIGALRM, lambda *a: print('rang'))\nsignal.setitimer("
     "signal.ITIMER_REAL, 0.01); signal.pause()", "rang"),
    ("import dataclasses, enum, typing\n@dataclasses.dataclass\nclass A:\n    x: int = 3\nprint(A())",
     "A(x=3)"),
    ("import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(1, 1)\n"
     "print(unittest.TextTestRunner(verbosity=0).run(unittest.defaultTestLoader.loadTestsFromTestCase(T))"
     ".wasSuccessful())", "True"),
    ("import socket; a, b = socket.socketpair(); a.sendall(b'pair'); print(b.recv(9).decode())", "pair"),
    ("print('end')\nexit()\nprint('no')", "end"), ("print('end'); quit(0)", "end"),
    ("import numpy as np; print((np.arange(4).reshape(2, 2) @ np.eye(2)).sum())", "6.0"),
    ("import numpy as np; print(np.linalg.solve(np.eye(2) * 2, [2, 4]), np.random.default_rng(0).integers(9)"
     ")", "[1. 2.] 7"),
    ("import sys; print(len(str(3 ** 20_000)), int('7' * 5000) % 10)", "9543 7"),
    ("print(sorted({'b', 'a'}), {3, 1, 2}, len({str(i) for i in range(999)}))", "['a', 'b'] {1, 2, 3} 999"),
]
"""Programs, and their output for the input "3 4"."""


def test_honest_programs_are_not_affected(sandbox: Sandbox) -> None:
    programs = [Program(source, stdin="3 4\n") for source, _ in HONEST_PROGRAMS]
    for outcome, (source, expected) in zip(map(sandbox.run, programs), HONEST_PROGRAMS, strict=True):
        assert (outcome.status, outcome.stdout.strip()) == ("ok", expected), (source, outcome)
        assert outcome.stderr == "" or "unittest" in source


@pytest.mark.parametrize("package", ["torch", "pytest", "safetensors", "megatron_sov"])
def test_programs_can_import_only_numpy_of_this_environment(sandbox: Sandbox, package: str) -> None:
    source = f"""
import os
import numpy
site_packages = os.path.dirname(os.path.dirname(numpy.__file__))
for path in ("{package}/__init__.py", "{package}"):
    try:
        print(open(site_packages + "/" + path).read(1) or "read", os.listdir(site_packages + "/" + path))
    except OSError:
        pass
try:
    print(set(os.listdir(site_packages)) - {{"numpy", "numpy.libs"}} or "")
except OSError:
    print()
try:
    open(numpy.__file__, "a")
    print("written")
except OSError:
    pass
import {package}
"""
    outcome = sandbox.run(Program(source))
    assert (outcome.status, outcome.stdout.strip()) == ("error", ""), outcome
    assert f"No module named '{package}'" in outcome.stderr


def test_an_environment_below_tmp_is_readable_without_its_neighbors(
        sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    folder = tempfile.mkdtemp(dir="/tmp")  # pytest's folder may not be below /tmp
    request.addfinalizer(lambda: shutil.rmtree(folder))
    package = Path(folder, "venv/site-packages/numpy")
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("VALUE = 7")
    Path(folder, "secret").write_text("secret")
    (package.parent / "torch").mkdir()
    monkeypatch.setattr("megatron_sov.sandbox.sandbox.find_packages", lambda: {"numpy": str(package)})
    with Sandbox(enclosure=sandbox.enclosure) as own:
        outcome = own.run(Program(f"""
import os, numpy
print(numpy.VALUE, os.listdir("."))
for attempt in (lambda: open("{folder}/secret").read(), lambda: os.listdir("{package.parent}/torch"),
                lambda: open(numpy.__file__, "w"), lambda: os.rename("{package}", "{package}-mine"),
                lambda: open("{package}/new", "w")):
    try:
        print(attempt())
    except OSError:
        pass
"""))
    assert (outcome.status, outcome.stdout) == ("ok", "7 ['program.py']\n"), outcome
    assert sorted(os.listdir(package)) == ["__init__.py"]


def test_a_package_that_programs_cannot_read_is_refused(sandbox: Sandbox, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.sandbox.sandbox.find_packages", lambda: {"numpy": str(tmp_path)})
    with pytest.raises(UserError, match=f"cannot read the Python environment .*{tmp_path}/__init__.py"):
        Sandbox(enclosure=sandbox.enclosure)


def test_a_folder_of_all_users_never_becomes_readable(tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (library := shared / "libpreloaded.so").touch()
    (maps := tmp_path / "maps").write_text(f"7f00-7f01 r--p 00000000 fd:00 12  {library}\n")
    monkeypatch.setattr(restrictions, "Path", lambda _: maps)
    assert str(shared) in restrictions.list_readable_paths()
    shared.chmod(0o1777)
    assert str(library) in restrictions.list_readable_paths()
    monkeypatch.setattr(sys, "base_prefix", str(shared))
    with pytest.raises(UserError, match=f"{shared}: the Python installation lies in a folder of all users"):
        Sandbox()


LIMITS = Limits(wall_s=1, cpu_s=20, memory_bytes=256 << 20)
LOW_PRIORITY = """
import os, time
os.sched_setaffinity(0, {{{core}}})
os.setpriority(os.PRIO_PROCESS, 0, 10)
if os.path.exists("/proc/self/autogroup"):  # with autogroups, priorities only count within a session
    open("/proc/self/autogroup", "w").write("10")
"""
"""Prefix of a program that runs on one core with low priority, which only `command_sandbox` allows."""


@pytest.fixture(scope="module")
def command_sandbox() -> Iterator[Sandbox]:
    """A sandbox whose command is a plain shell, which encloses nothing."""
    with Sandbox(LIMITS, command=("sh", "-c", f'exec {sys.executable} -IS "$1"')) as sandbox:
        yield sandbox


@pytest.fixture
def busy_core() -> Iterator[int]:
    """The number of a core on which another process computes for three times the wall-time limit."""
    core = min(os.sched_getaffinity(0))
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {core})
        end_s = time.monotonic() + 3 * LIMITS.wall_s  # then a killed program gets the core, to end
        while time.monotonic() < end_s:
            pass
        os._exit(0)
    yield core
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


WORK = """
import threading
def work():
    while time.process_time() < 0.25: pass
threading.Thread(target=work).start()
"""


def test_waiting_for_a_processor_does_not_count_as_time(command_sandbox: Sandbox, busy_core: int) -> None:
    outcome = command_sandbox.run(Program(LOW_PRIORITY.format(core=busy_core) + WORK))
    assert outcome.status == "ok" and outcome.wall_s > LIMITS.wall_s and outcome.starved_s, outcome


def test_a_program_that_sleeps_is_not_starved(command_sandbox: Sandbox, busy_core: int) -> None:
    outcome = command_sandbox.run(Program(
        "import time; time.sleep(0.1); open('x', 'w').write('x'); time.sleep(60)"))
    assert outcome.status == "timeout"
    assert outcome.wall_s - outcome.starved_s > LIMITS.wall_s / 3, outcome


def test_resources_of_the_enclosing_command_count(command_sandbox: Sandbox) -> None:
    outcome = command_sandbox.run(Program("import time; x = bytearray(b'x' * (100 << 20)); time.sleep(5)"),
                                  Limits(wall_s=20, memory_bytes=64 << 20))
    assert outcome.status == "memory", "the shell's process has become the program"
