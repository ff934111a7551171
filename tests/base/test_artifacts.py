"""Write, replace, verify and clean up artifacts; sealed files."""

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from blake3 import blake3

from megatron_sov.base import artifacts
from megatron_sov.base.artifacts import (
    MANIFEST, FileRecord, check_output_folder, create_artifact, find_damaged_files, format_json,
    manifest_sha256, read_manifest, sha256_file, write_atomically)
from megatron_sov.base.digests import hash_file
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import find_seal_damage, read_sealed_json, write_sealed, write_sealed_json

BLAKE3_OF_ABC = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
"""As in the test vectors of other implementations."""


def write_artifact(path: Path, kind: str = "tokens", text: str = "hello", **options: Any) -> Path:
    """Write an artifact with a file sub/data.bin that contains `text`; `options` go to `create_artifact`."""
    with create_artifact(path, kind, **options) as writer:
        writer.content["num_documents"] = 1
        writer.settings["seed"] = 7
        (writer.path / "sub").mkdir()
        (writer.path / "sub/data.bin").write_text(text)
    return path


def run_and_kill(body: str, path: Path) -> None:
    """Run `body` in a process that is killed (SIGKILL) when it prints "now"."""
    program = ("import os, sys, time\nfrom megatron_sov.base import artifacts\n"
               "path = artifacts.Path(sys.argv[1])\n")
    process = subprocess.Popen([sys.executable, "-c", program + textwrap.dedent(body), str(path)],
                               stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.kill()
    process.communicate()


def test_artifact_round_trip(tmp_path: Path) -> None:
    source = write_artifact(tmp_path / "source", "corpus")
    with create_artifact(tmp_path / "deep/er/a", "tokens") as writer:
        writer.content["num_tokens"] = 3
        writer.settings["seed"] = 7
        writer.add_input(source)
        (writer.path / "data.bin").write_bytes(b"abc")
    manifest = read_manifest(tmp_path / "deep/er/a", "tokens")
    assert (manifest.content, manifest.settings) == ({"num_tokens": 3}, {"seed": 7})
    assert manifest.files == {"data.bin": FileRecord(f"blake3:{BLAKE3_OF_ABC}", 3)}
    assert manifest.inputs == [{"kind": "corpus", "path": str(source),
                                "manifest_sha256": manifest_sha256(source)}]
    assert find_damaged_files(tmp_path / "deep/er/a") == []
    assert [p.name for p in (tmp_path / "deep/er").iterdir()] == ["a"]


def test_killed_writer_leaves_no_artifact_and_leftovers_are_cleared(tmp_path: Path) -> None:
    path = tmp_path / "a"
    run_and_kill("""
        with artifacts.create_artifact(path, "tokens") as writer:
            (writer.path / "data.bin").write_text("half")
            print("now", flush=True)
            time.sleep(60)
    """, path)
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1, "the temporary folder is still there"
    write_artifact(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_artifact_moved_aside_by_killed_process_is_restored(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a", text="old")
    run_and_kill("""
        rename = os.rename
        def stop_after(source, target):
            rename(source, target)
            print("now", flush=True)
            time.sleep(60)
        os.rename = stop_after
        with artifacts.create_artifact(path, "tokens", overwrite=True):
            pass
    """, path)
    assert not path.exists()
    with pytest.raises(UserError, match="already exists"):
        write_artifact(path, text="new")
    assert (path / "sub/data.bin").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_folder_of_running_process_is_not_removed(tmp_path: Path) -> None:
    other = tmp_path / f".a.tmp-{os.getppid()}"
    other.mkdir()
    write_artifact(tmp_path / "a")
    assert other.exists()


def test_folder_of_zombie_process_is_cleared(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
        (leftover := tmp_path / f".a.tmp-{child.pid}").mkdir()
        write_artifact(tmp_path / "a")
        assert not leftover.exists()


@pytest.mark.parametrize("overwrites", [False, True])
def test_leftover_with_own_pid_is_cleared(tmp_path: Path, overwrites: bool) -> None:
    """In a container the first process has the number 1, every time that it is started."""
    old = write_artifact(tmp_path / "a", text="old")
    os.rename(old, tmp_path / f".a.old-{os.getpid()}")
    (half := tmp_path / f".a.tmp-{os.getpid()}").mkdir()
    (half / "data.bin").write_text("half")
    if overwrites:
        write_artifact(tmp_path / "a", overwrite=True, text="new")
    else:
        with pytest.raises(UserError, match="already exists"):
            write_artifact(tmp_path / "a")
    assert (tmp_path / "a/sub/data.bin").read_text() == ("new" if overwrites else "old")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("is_own_pid", [False, True])
def test_folder_locked_from_another_container_is_not_removed(tmp_path: Path, is_own_pid: bool) -> None:
    """In this container, the process id of the lock belongs to no process, or to the test's own."""
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        child.wait()
    pid = os.getpid() if is_own_pid else child.pid
    locked_folder = tmp_path / f".a.tmp-{pid}"
    program = """import sys
from pathlib import Path
from megatron_sov.base import artifacts
artifacts.os.getpid = lambda: int(sys.argv[2])
with artifacts.create_artifact(Path(sys.argv[1]), "tokens") as writer:
    print("now", flush=True)
    sys.stdin.read()
    (writer.path / "data.bin").write_text("theirs")
"""
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "a"), str(pid)], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          cwd=Path(__file__).parents[2]) as other:
        assert other.stdout is not None and other.stdout.readline() == "now\n"
        if is_own_pid:
            with pytest.raises(UserError, match="a: another process is making it; wait for it, choose"):
                write_artifact(tmp_path / "a")
        else:
            artifacts.clear_leftovers(tmp_path / "a")
        assert locked_folder.is_dir()
        other.communicate("")
    assert other.returncode == 0 and (tmp_path / "a/data.bin").read_text() == "theirs"


def test_exception_removes_temporary_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), create_artifact(tmp_path / "a", "tokens") as writer:
        (writer.path / "data.bin").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_full_disk_is_one_sentence_and_removes_temporary_folder(tmp_path: Path) -> None:
    with (pytest.raises(UserError, match="a: no space left on the device; free some"),
          create_artifact(tmp_path / "a", "tokens")):
        Path("/dev/full").write_text("x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.each(("code", "message"), [
    (errno.ENOSPC, "no space left on the device"), (errno.EROFS, "cannot be written"),
    (errno.EACCES, "cannot be written"),
])
def test_atomic_write_keeps_old_content_on_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      code: int, message: str) -> None:
    path = tmp_path / "report.html"
    write_atomically(path, "old")

    def refuse(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=rf"report\.html: {message}"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.each(("path", "message"), [
    (".", "has no name of its own"), ("..", "has no name of its own"),
    ("file/x", "file is a file, so nothing can lie in it")])
def test_impossible_artifact_paths_are_refused(cwd: Path, path: str, message: str) -> None:
    (cwd / "file").touch()
    with pytest.raises(UserError, match=message):
        check_output_folder(Path(path), "text", overwrite=True)
    with pytest.raises(UserError, match=message), create_artifact(path, "text"):
        pytest.fail("it begins to be made")
    assert [p.name for p in cwd.iterdir()] == ["file"]


def test_unexpected_disk_error_is_not_translated(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), create_artifact(tmp_path / "a", "tokens") as writer:
        writer.path.write_text("a folder cannot be written like a file")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with create_artifact(tmp_path / "a", "tokens") as writer:
        for name in ("flipped", "gone", "short", "whole"):
            (writer.path / name).write_text("content")
    (tmp_path / "a/flipped").write_text("cOntent")
    (tmp_path / "a/gone").unlink()
    (tmp_path / "a/short").write_text("cont")
    assert find_damaged_files(tmp_path / "a") == [
        f"{tmp_path}/a/flipped: its content differs from the hash in the manifest",
        f"{tmp_path}/a/gone: is missing",
        f"{tmp_path}/a/short: has 4 bytes, the manifest says 7",
    ]


def test_overwrite_replaces_only_same_kind(tmp_path: Path) -> None:
    path = write_artifact(tmp_path / "a", text="old")
    with pytest.raises(UserError, match="already exists; choose another output folder, or pass --overwrite"):
        write_artifact(path, text="new")
    with pytest.raises(UserError, match="is not a 'tokenizer' artifact, so it is not replaced"):
        write_artifact(path, kind="tokenizer", text="new", overwrite=True)
    assert (path / "sub/data.bin").read_text() == "old"
    write_artifact(path, text="new", overwrite=True)
    assert (path / "sub/data.bin").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_overwrite_refuses_foreign_folders(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("home", "file"):
        with pytest.raises(UserError, match="so it is not replaced"):
            write_artifact(tmp_path / name, overwrite=True)
    assert (tmp_path / "home/thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "a file"


def edit_manifest(path: Path, **changes: Any) -> Path:
    """Change fields of an artifact's manifest by hand, which has no hash of itself then."""
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": ""} | changes))
    return path


@pytest.mark.each("record", [{"digest": "md5:12", "size_bytes": 5}, {"digest": 3, "size_bytes": 5},
                                    {"size_bytes": 5}, {"digest": "", "size_bytes": 5}, []])
def test_unknown_digest_algorithm_is_damage(tmp_path: Path, record: Any) -> None:
    path = edit_manifest(write_artifact(tmp_path / "a"), files={"sub/data.bin": record})
    with pytest.raises(UserError, match=r"a/manifest\.json: is damaged \(.+\); make it again or restore"):
        read_manifest(path)


@pytest.mark.each("version, fix", [(3, "update megatron-sov"), (1, "make the folder again")])
def test_another_manifest_format_is_refused(tmp_path: Path, version: int, fix: str) -> None:
    path = edit_manifest(write_artifact(tmp_path / "a"), format_version=version, shards=[])
    with pytest.raises(UserError, match=f"has format_version {version}, not 2; {fix}"):
        read_manifest(path)


@pytest.mark.each("text", [
    "", "{", "[]", "{}", "null", '{"files": {}, "format_version": "x"}', '{"files": 3, "format_version": 2}',
    "[" * 200_000,
])
def test_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    path = write_artifact(tmp_path / "a")
    (path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"a/manifest\.json: is damaged \(.+\); make it again or restore"):
        read_manifest(path)


def test_manifest_detects_changed_bytes(tmp_path: Path) -> None:
    """Every changed byte is detected, even if the manifest still parses."""
    file = write_artifact(tmp_path / "a") / MANIFEST
    intact = file.read_bytes()
    assert read_manifest(tmp_path / "a").sha256.encode() in intact
    for index in range(len(intact)):
        file.write_bytes(intact[:index] + bytes([intact[index] ^ 1]) + intact[index + 1:])
        with pytest.raises(UserError, match=r"manifest\.json"):
            read_manifest(tmp_path / "a")
    for length in (0, 1, len(intact) // 2, len(intact) - 1):
        file.write_bytes(intact[:length])
        with pytest.raises(UserError, match=r"manifest\.json: is damaged"):
            read_manifest(tmp_path / "a")
    file.write_bytes(intact)
    assert read_manifest(edit_manifest(tmp_path / "a", kind="tokens")).sha256 == ""


def test_wrong_artifact_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, reason in (("nowhere", "does not exist"), ("file", "has no manifest.json")):
        with pytest.raises(UserError, match=f"{name}: {reason}, so it is not a 'tokens' artifact"):
            read_manifest(tmp_path / name, "tokens")
    with pytest.raises(UserError, match="is a 'tokens' artifact where a 'tokenizer' artifact is needed"):
        read_manifest(write_artifact(tmp_path / "a"), "tokenizer")


def test_file_hashes_match_libraries_across_blocks(tmp_path: Path) -> None:
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1):
        data = bytes(i % 251 for i in range(256)) * (size // 256 + 1)
        (tmp_path / "f").write_bytes(data[:size])
        assert sha256_file(tmp_path / "f") == hashlib.sha256(data[:size]).hexdigest()
        assert hash_file(tmp_path / "f") == f"blake3:{blake3(data[:size]).hexdigest()}"


def test_format_json_of_dataclasses_and_paths(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Point:
        x: float
        where: Path

    assert json.loads(format_json({"p": Point(0.1, Path("a/b"))})) == {"p": {"x": 0.1, "where": "a/b"}}
    with pytest.raises(TypeError, match="set cannot be written as JSON"):
        format_json({1, 2})


@pytest.mark.each("files", [{"../outside": 1}, {"/etc/passwd": 1}, {"": 1}, {"a/../../b": 1}])
def test_manifest_refuses_files_outside_folder(tmp_path: Path, files: dict[str, int]) -> None:
    record = {"size_bytes": 1, "digest": f"blake3:{BLAKE3_OF_ABC}"}
    (tmp_path / "manifest.json").write_text(json.dumps({
        "format_version": 2, "kind": "tokens", "files": dict.fromkeys(files, record)}))
    with pytest.raises(UserError, match=r"is damaged .it names the file .*, which is not inside the folder"):
        read_manifest(tmp_path)


def test_a_named_pipe_is_no_manifest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json: is damaged \(it is not a regular file\)"):
        read_manifest(tmp_path)


def test_linked_output_is_written_to_target(tmp_path: Path) -> None:
    """As where a folder is a link to a larger disk."""
    (tmp_path / "disk/real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk/real")
    check_output_folder(tmp_path / "out", "tokens", overwrite=False)
    write_artifact(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and read_manifest(tmp_path / "disk/real").kind == "tokens"
    with pytest.raises(UserError, match="already exists"):
        write_artifact(tmp_path / "out")
    write_artifact(tmp_path / "out", text="again", overwrite=True)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/real/sub/data.bin").read_text() == "again"
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["real"]
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"lost: is a link to .*nowhere, which does not exist"):
        check_output_folder(tmp_path / "lost", "tokens", overwrite=False)
    with pytest.raises(UserError, match=r"lost: is a link to .*nowhere, which does not exist"):
        write_artifact(tmp_path / "lost")


def test_sealed_file_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "numbers.f32"
    assert "cannot be read (No such file or directory)" in str(find_seal_damage(file))
    for content in (b"", b"1234", bytes(range(256)) * 9):
        write_sealed(file, content)
        complete = file.read_bytes()
        assert find_seal_damage(file) is None and complete.startswith(content)
        variants = [complete[:-1], complete + b"x"]
        for index in {0, len(content) // 2, len(complete) - 1}:
            variants.append(complete[:index] + bytes([complete[index] ^ 16]) + complete[index + 1:])
        for damaged in variants:
            file.write_bytes(damaged)
            assert "is damaged (it " in str(find_seal_damage(file))


def test_seal_detects_file_of_another_owner(tmp_path: Path) -> None:
    file = tmp_path / "numbers.f32"
    write_sealed(file, b"1234", "round 1")
    assert find_seal_damage(file, "round 1") is None
    for other in ("round 2", ""):
        assert "differs from its own checksum" in str(find_seal_damage(file, other))
    write_sealed_json(tmp_path / "a.json", {"a": 1}, "here")
    assert read_sealed_json(tmp_path / "a.json", owner="here") == {"a": 1}
    with pytest.raises(UserError, match=r"a.json: is damaged or belongs elsewhere .it differs"):
        read_sealed_json(tmp_path / "a.json", owner="there")
