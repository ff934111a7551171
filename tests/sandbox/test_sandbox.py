"""What a sandbox gives back, and what becomes of it when something goes wrong on its side."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.sandbox.enclosures import MAX_ENTRIES, EnclosureUnavailable, remove, size_bytes
from megatron_sov.sandbox.program import Limits, Outcome, Program
from megatron_sov.sandbox.sandbox import Sandbox, Worker


def test_a_program_reads_writes_and_ends_as_it_would_alone(sandbox: Sandbox) -> None:
    outcome = sandbox.run(Program(
        "import sys, part.other\nprint(input(), open('data/x.txt').read(), sys.argv[1:], part.other.VALUE)\n"
        "print('oh', file=sys.stderr)\nsys.exit(3)",
        stdin="given\n", files={"data/x.txt": "읽다", "part/other.py": "VALUE = 7"}, arguments=("a", "b c")))
    assert (outcome.status, outcome.exit_code) == ("error", 3)
    assert outcome.stdout == "given 읽다 ['a', 'b c'] 7\n"
    assert outcome.stderr == "oh\n" and outcome.reason == "exit code 3: oh"


def test_an_error_is_told_as_an_interpreter_tells_it(sandbox: Sandbox) -> None:
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
def test_an_exit_code_that_is_not_zero_is_no_success(sandbox: Sandbox, code: str, exit_code: int) -> None:
    assert sandbox.run(Program(f"raise SystemExit({code})")).exit_code == exit_code


def test_threads_and_exit_functions_end_with_a_program_and_its_output_is_whole(sandbox: Sandbox) -> None:
    outcome = sandbox.run(Program(
        "import atexit, threading, time\natexit.register(lambda: print('last'))\nsaid = threading.Event()\n"
        "threading.Thread(target=lambda: (said.wait(), time.sleep(0.05), print('thread'))).start()\n"
        "print('x' * 300000)\nsaid.set()"))
    assert outcome.status == "ok" and outcome.stdout == "x" * 300000 + "\nthread\nlast\n"


def test_each_program_finds_an_empty_folder_of_its_own(sandbox: Sandbox) -> None:
    for _ in range(2):
        outcome = sandbox.run(Program("import os; print(os.listdir('.')); open('left', 'w').write('x')"))
        assert outcome.stdout == "['program.py']\n"


def test_another_language_is_run_by_its_command(sandbox: Sandbox) -> None:
    outcome = sandbox.run(Program("read x; echo $1 $x > y; cat y; exit 4", "in\n", language="bash",
                                  arguments=("out",)))
    assert (outcome.stdout, outcome.exit_code) == ("out in\n", 4)
    outcome = sandbox.run(Program("x", language="cobol"))
    assert outcome.status == "refused" and "'cobol': there is no command for it here" in outcome.reason


@pytest.mark.parametrize("program, what", [
    (Program("", files={"../x": ""}), "'../x' must be a relative path"),
    (Program("", files={"/etc/x": ""}), "'/etc/x' must be a relative path"),
    (Program("\ud800"), "half of a surrogate pair"),
    (Program("", arguments=("a\0b",)), "zero byte"),
    (Program("", stdin=b"x"), "stdin is of type bytes"),  # type: ignore[arg-type]
])
def test_what_is_no_program_is_refused(program: Program, what: str) -> None:
    assert what in program.problem()


def test_a_program_longer_than_the_limit_is_refused() -> None:
    assert "17,825,792 bytes" in Program("x" * (17 << 20)).problem()


def test_outcomes_come_in_order_from_several_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = threading.Barrier(2, timeout=600)

    def run(self: Worker, *given: Any, now: Any = Worker.run) -> Outcome:
        meeting.wait()  # two run at a time
        outcome: Outcome = now(self, *given)
        return outcome

    monkeypatch.setattr(Worker, "run", run)
    with Sandbox(workers=2) as sandbox:
        outcomes = list(sandbox.run_many(Program(f"print({i})") for i in range(4)))
    assert [outcome.stdout for outcome in outcomes] == ["0\n", "1\n", "2\n", "3\n"]


def test_a_server_that_dies_is_no_verdict_and_is_replaced(sandbox: Sandbox, tmp_path: Path,
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


def test_nothing_is_left_when_whoever_has_a_sandbox_is_killed(sandbox: Sandbox, tmp_path: Path) -> None:
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        tempfile.tempdir = str(tmp_path)
        with Sandbox(enclosure=sandbox.enclosure) as own:
            children = [child.pid for child in psutil.Process().children(recursive=True)]
            os.write(tell, f"{children}\n".encode())
            own.run(Program("import time; time.sleep(600)"), Limits(wall_s=600))
        os._exit(0)
    servers = [psutil.Process(child) for child in eval(os.read(told, 1000))]
    assert servers
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    _, alive = psutil.wait_procs(servers, timeout=600)
    assert not alive and not list(tmp_path.iterdir())


def test_settings_that_cannot_be_kept_are_named_together() -> None:
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


def test_a_command_of_ones_own_encloses(tmp_path: Path) -> None:
    wrapper = tmp_path / "wrapper"
    wrapper.write_text('#!/bin/sh\necho "in $1" > "$1/told"\nshift\nexec "$@"\n')
    wrapper.chmod(0o755)
    with Sandbox(Limits(wall_s=20), command=(str(wrapper), "{folder}"),
                 languages={"python": (sys.executable, "-S", "{file}")}) as sandbox:
        assert sandbox.enclosure == "command"
        outcome = sandbox.run(Program("import sys; print(input(), sys.argv[1:], open('told').read())", "x\n",
                                      arguments=("y",)))
        assert outcome.stdout.startswith("x ['y'] in ") and outcome.status == "ok"
        folder = outcome.stdout.split()[3]
        assert not Path(folder).exists()
        waits = Program("sleep 60 & sleep 60", language="bash")
        assert sandbox.run(waits, Limits(wall_s=0.3)).status == "timeout"
        assert sandbox.run(Program("yes", language="bash")).status == "output"
        wrapper.unlink()
        assert sandbox.run(Program("")).status == "infrastructure"


def test_what_the_page_shows_runs(capfd: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs/sandbox.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for block in blocks:
        if shutil.which("cc") or "cc -x" not in block:
            exec(block, names := {**globals()})
    assert names["bubblewrap"][0] == "bwrap"
    lines = capfd.readouterr().out.splitlines()
    assert lines[1] == "ok 0 42" and ("C" in lines or not shutil.which("cc"))
    assert lines.count("error exit code 1: ZeroDivisionError: division by zero") == 3


NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of a user who is not root, whom no folder is closed to."""
    made = Path(tempfile.mkdtemp(prefix="folders-", dir="/tmp"))
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(made, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield made
    finally:
        if is_root:
            os.seteuid(0)
        shutil.rmtree(made, ignore_errors=True)


def test_what_lies_deeper_than_any_path_is_counted(folder: Path) -> None:
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
    num_bytes, num_entries = size_bytes(str(folder))
    assert num_bytes >= 1 << 16 and num_entries == 32
    remove(str(folder))
    assert not folder.exists()


@pytest.mark.parametrize("mode", [0o000, 0o300, 0o500])
def test_what_its_owner_may_not_enter_is_full_and_goes(folder: Path, mode: int) -> None:
    (folder / "outer" / "closed").mkdir(parents=True)
    (folder / "outer" / "closed" / "file").write_text("x")
    (folder / "outer" / "closed").chmod(mode)
    assert (size_bytes(str(folder))[1] == MAX_ENTRIES) == (mode != 0o500)
    remove(str(folder))
    assert not folder.exists()
