"""A killed conversion leaves nothing under its name, goes on where it was, and gives the bytes of an
uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_sov import convert
from megatron_sov.artifacts import MANIFEST
from megatron_sov.convert import resume, shard_writer
from megatron_sov.convert.resume import partial_folder, resumable_artifact
from megatron_sov.errors import UserError

FILE_BYTES = 6_000
KILLED = f"""
    import json, os, signal, sys, threading
    from megatron_sov import convert
    from megatron_sov.convert import hf_import, shard_writer

    def convert_and_die(action, source, out, kill_after):
        def counted(*args, real=shard_writer.write_file, count=[0], lock=threading.Lock()):
            with lock:
                count[0] += 1
                if count[0] > kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)
        shard_writer.write_file, hf_import.MAX_FILE_BYTES = counted, {FILE_BYTES}
        limits = {{}} if action == "from_hf" else {{"max_shard_bytes": {FILE_BYTES}}}
        getattr(convert, action)(source, out, workers=2, **limits)

    for job in json.loads(sys.argv[1]):
        if (child := os.fork()) == 0:
            convert_and_die(*job)
            os._exit(0)
        print(-os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        sys.stdin.readline()
"""
"""Runs each conversion in a child of its own that dies when `kill_after` files have begun,
and waits to be told to go on."""


def content(folder: Path) -> dict[str, object]:
    """Return the bytes of every file; of the manifest all but its time."""
    found: dict[str, object] = {p.relative_to(folder).as_posix(): p.read_bytes()
                                for p in folder.rglob("*") if p.is_file()}
    found[MANIFEST] = {k: v for k, v in json.loads((folder / MANIFEST).read_text()).items()
                       if k not in ("created_s", "sha256")}
    return found


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.convert.hf_import.MAX_FILE_BYTES", FILE_BYTES)


def test_a_killed_conversion_goes_on_to_the_same_bytes(solar_dir: Path, tmp_path: Path, small_files: None,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    convert.from_hf(solar_dir, tmp_path / "ckpt")
    sources = {"from_hf": solar_dir, "to_hf": tmp_path / "ckpt"}
    jobs = [(action, str(source), str(tmp_path / action), kill_after) for action, source in sources.items()
            for kill_after in (3, 5)]
    command = [sys.executable, "-c", textwrap.dedent(KILLED), json.dumps(jobs)]
    finished: dict[str, list[set[str]]] = {action: [] for action in sources}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killer:
        assert killer.stdin is not None and killer.stdout is not None
        for action, _, out, _ in jobs:
            assert killer.stdout.readline() == f"{int(signal.SIGKILL)}\n"
            assert not Path(out).exists()
            lines = (partial_folder(Path(out)) / resume.FINISHED).read_text().splitlines()
            finished[action].append({json.loads(line)["name"] for line in lines})
            killer.stdin.write("go on\n")
            killer.stdin.flush()
    real = shard_writer.write_file
    for action, source in sources.items():
        first, second = finished[action]
        assert first and first < second, "the second attempt went on from the first"
        out, written = tmp_path / action, []
        work = partial_folder(out) / resume.CONTENT
        (work / "half-written").write_text("stray")
        monkeypatch.setattr(shard_writer, "write_file",
                            lambda path, *rest, written=written: (written.append(path), real(path, *rest))[1])
        arguments = {} if action == "from_hf" else {"max_shard_bytes": FILE_BYTES}
        getattr(convert, action)(source, out, **arguments)
        assert written and not second & {p.relative_to(work).as_posix() for p in written}
        getattr(convert, action)(source, tmp_path / "whole", **arguments)
        assert content(out) == content(tmp_path / "whole")
        shutil.rmtree(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_another_plan_a_changed_source_or_a_lost_file_begin_anew(tmp_path: Path) -> None:
    def attempt(plan: dict[str, object]) -> list[str]:
        """Finish files "a" and "b" and die; return what was there before."""
        with pytest.raises(KeyboardInterrupt), resumable_artifact(tmp_path / "out", "kind", plan) as artifact:
            before = sorted(artifact.finished)
            for name in {"a", "b"} - artifact.finished.keys():
                (artifact.path / name).write_bytes(b"1234")
                artifact.finish(name, shard_writer.FileRecord("blake3:12", 4))
            raise KeyboardInterrupt
        return before

    work = partial_folder(tmp_path / "out")
    assert (attempt({"p": 1}), attempt({"p": 1}), attempt({"p": 2})) == ([], ["a", "b"], [])
    (work / resume.CONTENT / "a").write_bytes(b"123")
    assert attempt({"p": 2}) == ["b"]
    with open(work / resume.FINISHED, "a") as f:
        f.write('{"name": "c", "dig')
    assert attempt({"p": 2}) == ["a", "b"]
    log = (work / resume.FINISHED).read_text()  # as earlier versions wrote it
    (work / resume.FINISHED).write_text(log.replace('"digest": "blake3:', '"sha256": "'))
    assert attempt({"p": 2}) == ["a", "b"]
    (source := tmp_path / "source").mkdir()
    (source / "file").write_text("x")
    before = resume.fingerprint(source)
    os.utime(source / "file", ns=(1, 1))
    assert resume.fingerprint(source) != before


def test_two_processes_do_not_make_one_artifact(tmp_path: Path) -> None:
    code = ("import sys, time; from pathlib import Path; from megatron_sov.convert.resume import "
            "resumable_artifact\n"
            "with resumable_artifact(Path(sys.argv[1]), 'kind', {}): print('in', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        with (pytest.raises(UserError, match="is being written by another process"),
              resumable_artifact(tmp_path / "out", "kind", {})):
            raise AssertionError("unreachable")
        assert partial_folder(tmp_path / "out").is_dir()
    finally:
        other.kill()
        other.wait()
    with resumable_artifact(tmp_path / "out", "kind", {}) as artifact:  # the lock went with the process
        (artifact.path / "f").touch()
    assert (tmp_path / "out/f").exists()


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError), resumable_artifact(tmp_path / "out", "kind", {}) as artifact:
        (artifact.path / "a").touch()
        raise UserError("no")
    assert list(tmp_path.iterdir()) == []


def test_the_loss_of_another_process_is_like_a_kill(tmp_path: Path) -> None:
    def make(error: Exception) -> None:
        with resumable_artifact(tmp_path / "out", "x", {}, kills=(RuntimeError,)):
            raise error

    with pytest.raises(RuntimeError):
        make(RuntimeError("connection closed by peer"))
    assert partial_folder(tmp_path / "out").is_dir()
    with pytest.raises(UserError):
        make(UserError("the data have changed"))
    assert os.listdir(tmp_path) == []


def test_a_disk_that_has_no_room_for_the_plan_is_left_as_it_was(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, data: str) -> None:
        raise UserError(f"{path}: no space left on the device")

    monkeypatch.setattr(resume, "atomic_write", refuse)
    with (pytest.raises(UserError, match=r"plan\.json: no space left"),
          resumable_artifact(tmp_path / "out", "kind", {})):
        raise AssertionError("unreachable")
    assert list(tmp_path.iterdir()) == []
