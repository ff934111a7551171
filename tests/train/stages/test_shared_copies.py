"""Runs that start from the same Hugging Face folder share its conversion; other files are converted again."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sov import convert
from megatron_sov.base.artifacts import MANIFEST, create_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.commands.train.setup.starts import refuse_many_converters
from megatron_sov.commands.train.training_run import convert_start
from megatron_sov.engine.parallel import launcher
from megatron_sov.runs.checkpoints import CHECKPOINT_KIND
from megatron_sov.train.stages.shared_copies import find_copy

FILES = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}", "README.md": "a model"}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def converted_weights(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the conversion by a copy in this process. The list receives the weights of each conversion."""
    weights: list[str] = []

    def from_hf(folder: Path, out: Path, *, redo: bool) -> None:
        with create_artifact(out, CHECKPOINT_KIND) as artifact:
            time.sleep(0.05)
            weights.append((folder / "model.safetensors").read_text())
            (artifact.path / "weights").write_text(weights[-1])

    def run_here(work: Callable[[], object]) -> int:
        work()
        return 0

    monkeypatch.setattr(convert, "from_hf", from_hf)
    monkeypatch.setattr(launcher, "run_in_fork", run_here)
    return weights


def test_runs_from_one_folder_share_one_copy(start: Path, tmp_path: Path,
                                             converted_weights: list[str]) -> None:
    runs = [tmp_path / "runs" / name for name in "abc"]
    assert find_copy(start, runs[0]) is None and not (tmp_path / "runs").exists()
    [copy] = {convert_start(start, run) for run in runs}
    assert converted_weights == ["weights"] and (copy / "weights").read_text() == "weights"
    assert copy.parent == tmp_path / "runs/.from-hf" and copy.name.startswith("my-model-")
    assert find_copy(start, runs[2]) == copy
    assert convert_start(copy, runs[0]) == copy, "a checkpoint needs no conversion"


def touch(folder: Path) -> None:
    os.utime(folder / "model.safetensors", (1, 1))


def write_in_place(folder: Path) -> None:
    """Write other weights of the same size with the earlier modification time."""
    file = folder / "model.safetensors"
    before = file.stat()
    file.write_text("WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_rename(folder: Path) -> None:
    shutil.copy2(folder / "model.safetensors", folder / "other")
    (folder / "other").write_text("WEIGHTS")
    os.utime(folder / "other", ns=(0, (folder / "model.safetensors").stat().st_mtime_ns))
    os.rename(folder / "other", folder / "model.safetensors")


CHANGES: dict[str, tuple[Callable[[Path], object], int]] = {
    "nothing": (lambda folder: None, 1), "times": (touch, 1),
    "a copy of the folder": (lambda folder: (
        shutil.copytree(folder, folder.parent / "x"), shutil.rmtree(folder),
        (folder.parent / "x").rename(folder)), 1),
    "weights, under their size and time": (write_in_place, 2), "weights, by a rename": (replace_by_rename, 2),
    "settings": (lambda folder: (folder / "config.json").write_text('{"a": 1}'), 2),
    "a file less": (lambda folder: (folder / "tokenizer.json").unlink(), 2),
    "a shard of another name": (lambda folder: (folder / "model.safetensors").rename(folder / "m.safetensors")
                                and (folder / "model.safetensors").write_text("x"), 2)}
"""Change of the folder -> (function that makes it, conversions for one run before and one after it)."""


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_whose_content_changes_gets_another_copy(change: str, start: Path, tmp_path: Path,
                                                          converted_weights: list[str]) -> None:
    change_folder, num_conversions = CHANGES[change]
    before = convert_start(start, tmp_path / "runs/a")
    change_folder(start)
    after = convert_start(start, tmp_path / "runs/b")
    assert (before == after) == (num_conversions == 1) and len(converted_weights) == num_conversions
    assert (before / MANIFEST).is_file(), "a run may use the earlier copy"
    assert find_copy(start, tmp_path / "runs/b") == after


def test_runs_that_begin_at_once_convert_once(start: Path, tmp_path: Path,
                                              converted_weights: list[str]) -> None:
    copies: list[Path] = []
    runs = [threading.Thread(target=lambda i=i: copies.append(convert_start(start, tmp_path / f"runs/{i}")))
            for i in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(copies) == 4 and len(set(copies)) == 1 and converted_weights == ["weights"]


def test_a_conversion_that_fails_leaves_no_copy(start: Path, tmp_path: Path, converted_weights: list[str],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs/a"
    with monkeypatch.context() as failing:
        failing.setattr(launcher, "run_in_fork", lambda work: 2)
        with pytest.raises(SystemExit):
            convert_start(start, run)
    assert find_copy(start, run) is None and converted_weights == []
    with monkeypatch.context() as changing:
        changing.setattr(launcher, "run_in_fork", lambda work: (work(), write_in_place(start), 0)[-1])
        with pytest.raises(UserError, match="my-model: its files changed"):
            convert_start(start, run)
    assert not list((tmp_path / "runs/.from-hf").glob("my-model-*")) and find_copy(start, run) is None
    assert convert_start(start, run).is_dir() and converted_weights == ["weights", "WEIGHTS"]


def test_a_deleted_copy_is_converted_again(start: Path, tmp_path: Path, converted_weights: list[str]) -> None:
    copy = convert_start(start, tmp_path / "runs/a")
    shutil.rmtree(copy)
    assert find_copy(start, tmp_path / "runs/a") is None
    assert convert_start(start, tmp_path / "runs/a") == copy and len(converted_weights) == 2


def test_many_processes_may_share_an_existing_copy(start: Path, tmp_path: Path, converted_weights: list[str],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs/a"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="many processes would convert"):
        refuse_many_converters(start, run)
    convert_start(start, run)
    refuse_many_converters(start, run)
