"""A run that is killed goes on, a worker that is killed is told, and a defect has its trace."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from data_prep import cli
from megatron_sov.artifacts import is_held
from megatron_sov.errors import UserError
from megatron_sov.work.locks import holding
from tests.data_prep.pipeline.test_running import contents

OWN = """import dataclasses, os, pathlib
from megatron_sov.documents import LeftOut

def judge(document):
    flag = pathlib.Path(__file__).with_name("killed")
    if flag.exists() and "text 3" in document.text:
        flag.unlink()
        os.kill(os.getpid(), 9)
    return dataclasses.replace(document, text=document.text.upper())
"""
STEPS = """  - shorten: {longest: 400}
  - unique: {}
  - shorten: {longest: 300}
"""


pytestmark = pytest.mark.usefixtures("without_page")


@pytest.fixture
def own(raw: Path) -> Path:
    """Write a pipeline with a step of one's own, which kills its process once where a file `killed` lies."""
    (raw / "own.py").write_text(OWN)
    file = raw / "pipeline.yaml"
    file.write_text(file.read_text().replace(STEPS, "  - code: own.py:judge\n").replace("{size}", "x"))
    return raw


def command(raw: Path, *words: str) -> list[str]:
    return ["run", str(raw / "pipeline.yaml"), "--output", str(raw / "out"), *words]


def test_killed_in_a_task_it_goes_on_to_the_same_bytes(own: Path) -> None:
    assert cli.main(command(own, "--workers", "1")) == 0
    undisturbed = contents(own / "out")
    shutil.rmtree(own / "out")
    (own / "killed").touch()
    done = subprocess.run([sys.executable, "-m", "data_prep.cli", *command(own, "--workers", "1")],
                          capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (own / "out/manifest.json").exists()
    (leftover,) = (own / "out/shards").glob("web/01-code-*/.*.tmp-*")
    assert cli.main(command(own, "--workers", "1")) == 0
    assert not leftover.exists() and contents(own / "out") == undisturbed


@pytest.mark.distributed
def test_a_worker_that_is_killed_is_told(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "killed").touch()
    assert cli.main(command(own, "--workers", "2")) == 2
    said = capsys.readouterr().err
    assert "was ended from outside" in said and " of source web" in said and "run the command again" in said
    assert cli.main(command(own, "--workers", "2")) == 0
    with_workers = contents(own / "out")
    shutil.rmtree(own / "out")
    assert cli.main(command(own, "--workers", "1")) == 0
    assert contents(own / "out") == with_workers, "the number of workers says nothing"


@pytest.mark.distributed
@pytest.mark.parametrize(("workers", "how"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGINT)])
def test_a_killed_command_leaves_neither_processes_nor_its_lock(
        own: Path, tmp_path: Path, request: pytest.FixtureRequest, workers: int, how: signal.Signals) -> None:
    (own / "own.py").write_text("import pathlib, time\n\ndef judge(document):\n"
                                "    pathlib.Path(__file__).with_name('begun').touch()\n"
                                "    time.sleep(600)\n")
    with open(tmp_path / "said", "w") as said:
        running = subprocess.Popen(
            [sys.executable, "-m", "data_prep.cli", *command(own, "--workers", str(workers))],
            stdout=said, stderr=said, start_new_session=True,
            # what runs tests in several processes ignores Ctrl-C, and so would its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    request.addfinalizer(lambda: [os.kill(pid, signal.SIGKILL) for pid in living(running.pid)])
    wait_until(lambda: (own / "begun").exists() or running.poll() is not None)
    if how == signal.SIGINT:
        os.killpg(running.pid, how)  # as a terminal does
    else:
        running.send_signal(how)
    assert running.wait(600) == (130 if how == signal.SIGINT else -signal.SIGKILL)
    wait_until(lambda: not is_held(own / "out"))
    wait_until(lambda: not living(running.pid))
    said_text = (tmp_path / "said").read_text()
    assert "Traceback" not in said_text, said_text


def living(group: int) -> list[int]:
    """Return the processes of a group that have not ended."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def wait_until(happened: Callable[[], bool]) -> None:
    """Wait for something that happens soon."""
    end = time.monotonic() + 600
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_a_mistake_of_the_users_code_is_a_sentence(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "own.py").write_text("def judge(document):\n    return 1 / 0\n")
    assert cli.main(command(own, "--workers", "1")) == 2
    said = capsys.readouterr().err
    assert "source web, shard " in said and ", code: " in said
    assert "division by zero" in said and "Traceback" not in said


def test_a_defect_of_a_step_has_its_trace(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.pipeline import pipeline_file
    from megatron_sov.work.arrays import TaskFailed

    monkeypatch.setattr(pipeline_file.step_class("shorten"), "outcomes",
                        lambda step, documents: documents[0].nothing)
    with pytest.raises(TaskFailed, match=r"no attribute 'nothing'\n.*source web, shard \d+, step shorten"):
        cli.main(command(raw, "--workers", "1"))


def test_a_disk_too_full_for_a_note_is_a_sentence(raw: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    from data_prep.pipeline import pipeline_file
    from megatron_sov.work import arrays

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="a sentence"), arrays.keeping_failure(raw / "nowhere", 0):
        raise UserError("a sentence")
    monkeypatch.setattr(pipeline_file.step_class("shorten"), "outcomes", full)
    assert cli.main(command(raw, "--workers", "1")) == 2
    said = capsys.readouterr().err
    assert "no space left on the device; free some space" in said and "Traceback" not in said


def test_two_commands_do_not_share_a_folder(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "out/inputs").mkdir(parents=True)
    with holding(raw / "out", "out"):
        assert cli.main(command(raw)) == 2
    assert "is being written by another process" in capsys.readouterr().err
