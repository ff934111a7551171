"""A killed conversion leaves no output, resumes, and gives the bytes of an uninterrupted conversion."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import convert
from megatron_sov.base.artifacts import MANIFEST
from megatron_sov.base.errors import UserError
from megatron_sov.convert import hf_import
from megatron_sov.work.progress.journal import list_recorded_items, work_folder
from megatron_sov.work.progress.resumable import CONTENT

FILE_BYTES = 6_000
KILLED_CONVERSIONS = f"""
    import json, os, signal, sys, threading
    from megatron_sov import convert
    from megatron_sov.convert import hf_import

    def convert_and_die(action, source, out, kill_after):
        def counted(*args, real=hf_import.write_tensors, count=[0], lock=threading.Lock()):
            with lock:
                count[0] += 1
                if count[0] > kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)
        hf_import.write_tensors, hf_import.MAX_FILE_BYTES = counted, {FILE_BYTES}
        limits = {{}} if action == "from_hf" else {{"max_shard_bytes": {FILE_BYTES}}}
        getattr(convert, action)(source, out, workers=2, **limits)

    for job in json.loads(sys.argv[1]):
        if (child := os.fork()) == 0:
            convert_and_die(*job)
            os._exit(0)
        print(-os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        sys.stdin.readline()
"""
"""Run each conversion in a child process that is killed after it has started `kill_after` files; then print
the signal, and wait for a line of input before the next conversion."""


def read_content(folder: Path) -> dict[str, object]:
    """Return the bytes of every file, and the manifest without its time."""
    content: dict[str, object] = {p.relative_to(folder).as_posix(): p.read_bytes()
                                  for p in folder.rglob("*") if p.is_file()}
    content[MANIFEST] = {k: v for k, v in json.loads((folder / MANIFEST).read_text()).items()
                         if k not in ("created_s", "sha256")}
    return content


@pytest.mark.deep
def test_killed_conversion_resumes_to_equal_bytes(solar_dir: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_import, "MAX_FILE_BYTES", FILE_BYTES)
    convert.from_hf(solar_dir, tmp_path / "ckpt")
    sources = {"from_hf": solar_dir, "to_hf": tmp_path / "ckpt"}
    jobs = [(action, str(source), str(tmp_path / action), kill_after) for action, source in sources.items()
            for kill_after in (3, 5)]
    command = [sys.executable, "-c", textwrap.dedent(KILLED_CONVERSIONS), json.dumps(jobs)]
    finished_files: dict[str, list[set[str]]] = {action: [] for action in sources}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killer:
        assert killer.stdin is not None and killer.stdout is not None
        for action, _, out, _ in jobs:
            assert killer.stdout.readline() == f"{int(signal.SIGKILL)}\n"
            assert not Path(out).exists()
            finished_files[action].append(set(map(str, list_recorded_items(work_folder(Path(out))))))
            killer.stdin.write("go on\n")
            killer.stdin.flush()
    write_tensors, written_files = hf_import.write_tensors, list[Path]()

    def record_and_write(path: Path, *arguments: Any) -> Any:
        written_files.append(path)
        return write_tensors(path, *arguments)

    monkeypatch.setattr(hf_import, "write_tensors", record_and_write)
    for action, source in sources.items():
        first, second = finished_files[action]
        assert first and first < second, "the second attempt continued the first"
        out, uninterrupted = tmp_path / action, tmp_path / "uninterrupted"
        work = work_folder(out) / CONTENT
        (work / "half-written").write_text("stray")
        arguments = {} if action == "from_hf" else {"max_shard_bytes": FILE_BYTES}
        with pytest.raises(UserError, match=r".keep., and is .float64."):
            getattr(convert, action)(source, out, "float64", **arguments)
        written_files.clear()
        getattr(convert, action)(source, out, **arguments)
        # finished files are not written again
        assert written_files and not second & {p.relative_to(work).as_posix() for p in written_files}
        getattr(convert, action)(source, uninterrupted, **arguments)
        assert read_content(out) == read_content(uninterrupted)
        shutil.rmtree(uninterrupted)
    assert not list(tmp_path.glob(".*"))
