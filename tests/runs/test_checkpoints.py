"""Finding, checking and pruning checkpoints."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from megatron_sov import convert, recipes
from megatron_sov.base.artifacts import create_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.convert.peft import from_peft, open_weights, to_peft
from megatron_sov.infer.engines.target import find_target
from megatron_sov.publish.report.run_data import read_run
from megatron_sov.runs import checkpoints
from megatron_sov.runs.checkpoints import (
    ADAPTER_BASE_MARKER, CHECKPOINT_KIND, KIND_CONSUMERS, AdapterBase, check_sound_checkpoint_exists,
    delete_checkpoints_after, delete_leftovers, find_adapter_base, find_checkpoint, find_damage,
    latest_checkpoint, protect_adapter_base, prune_checkpoints, read_checkpoint_settings,
    rename_damaged_checkpoint, suggest_replacement)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints after 5, 10 and 100 steps."""
    for step in (5, 10, 100):
        with create_artifact(tmp_path / "checkpoints" / f"step-{step}", "checkpoint"):
            continue
    return tmp_path


def test_damaged_newest_checkpoint_suggests_previous(run: Path) -> None:
    newest = run / "checkpoints" / "step-100"
    (run / "checkpoints/step-²").mkdir()
    assert latest_checkpoint(run / "checkpoints") == find_checkpoint(run) == find_checkpoint(newest) == newest
    (run / "checkpoints" / "step-200").mkdir()  # without a manifest
    with pytest.raises(UserError, match=r"checkpoint before it, .*/step-100$"):
        find_checkpoint(run)
    assert latest_checkpoint(run / "checkpoints") == run / "checkpoints" / "step-200"


def test_run_without_checkpoint_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no complete checkpoint yet"):
        find_checkpoint(tmp_path)


def test_find_damage_names_changed_file(run: Path) -> None:
    path = run / "checkpoints/step-7"
    with create_artifact(path, "checkpoint") as artifact:
        for name in ("state.json", "optimizer.index.json", "model/a", "model/b"):
            (artifact.path / name).parent.mkdir(exist_ok=True)
            (artifact.path / name).write_text(name)
    assert find_damage(path) is None and find_damage(run / "checkpoints/step-5") is None
    (path / "optimizer.index.json").write_text("optimizer.inDex.json")
    assert find_damage(path) == (
        f"{path}/optimizer.index.json: its content differs from the hash in the manifest")
    assert find_damage(path, weights_only=True) is None
    (path / "model/b").unlink()
    assert [find_damage(path, rank=r, size=2, weights_only=True) for r in range(2)] == [
        None, f"{path}/model/b: is missing"]
    assert suggest_replacement(path) == f"use the checkpoint before it, {run / 'checkpoints/step-5'}"
    assert (suggest_replacement(run / "checkpoints/step-5")
            == "there is no checkpoint before it; restore it from a copy")
    assert find_damage(run / "nowhere") == f"{run}/nowhere/manifest.json: is missing"


def test_only_lost_bytes_are_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path, record: object) -> None:
        raise OSError(number, os.strerror(number))

    path = run / "checkpoints/step-7"
    with create_artifact(path, "checkpoint") as artifact:
        (artifact.path / "a").touch()
    monkeypatch.setattr(checkpoints, "find_file_damage", fail)
    number = errno.EIO
    assert find_damage(path) == f"{path}/a: cannot be read (Input/output error)"
    number = errno.EACCES
    with pytest.raises(UserError, match=r"step-7/a: cannot be read \(Permission denied\); make the file"):
        find_damage(path)


SOUND = recipes.get("tiny-solar-open").to_dict()


@pytest.mark.each(("raw", "message"), [
    (SOUND | {"model": SOUND["model"] | {"num_kv_heads": 0}}, "model.num_kv_heads = 0 must be at least 1"),
    (SOUND | {"model": SOUND["model"] | {"num_layers": None}}, "model.num_layers = null"),
    (SOUND | {"model": SOUND["model"] | {"no_such_field": 1}}, "model.no_such_field: no such setting"),
    ({}, ""), ({"recipe": "x", "model": None}, ""), ({"recipe": "x", "model": []}, "")])
def test_invalid_settings_raise_user_error(raw: dict[str, object], message: str, tmp_path: Path) -> None:
    with create_artifact(tmp_path / "step-1", CHECKPOINT_KIND) as artifact:
        artifact.settings = raw
    with pytest.raises(UserError) as e:
        read_checkpoint_settings(tmp_path / "step-1")
    assert "manifest.json: its settings cannot be used" in str(e.value) and message in str(e.value)
    assert "export it with that version" in str(e.value)  # earlier checkpoints have the same settings


def test_run_with_only_damaged_checkpoints_is_rejected(run: Path) -> None:
    folder = run / "checkpoints"
    assert rename_damaged_checkpoint(folder / "step-100").name == "damaged-step-100"
    (folder / "step-100").mkdir()
    assert rename_damaged_checkpoint(folder / "step-100").name.startswith("damaged-step-100-")
    assert latest_checkpoint(folder) == folder / "step-10"
    check_sound_checkpoint_exists(folder)
    for step in (5, 10):
        rename_damaged_checkpoint(folder / f"step-{step}")
    assert latest_checkpoint(folder) is None and len(list(folder.iterdir())) == 4
    with pytest.raises(UserError, match=r"left .damaged-step-10, damaged-step-100.*restore"):
        check_sound_checkpoint_exists(folder)


def test_delete_leftovers_keeps_checkpoints(run: Path) -> None:
    folder = run / "checkpoints"
    files_before = sorted(folder.iterdir())
    for name in (".writing-step-200-1f", ".deleting-step-1-2e", ".try-ab"):
        (folder / name / "model").mkdir(parents=True)
    delete_leftovers(folder)
    assert sorted(folder.iterdir()) == files_before


@given(st.sets(st.integers(1, 40), max_size=12), st.sets(st.integers(1, 40)), st.integers(0, 4),
       st.integers(0, 7))
def test_prune_agrees_with_brute_force(tmp_path_factory, steps: set[int], incomplete: set[int],
                                       num_newest: int, every_steps: int) -> None:
    """The newest `num_newest` complete checkpoints (0: all), multiples of `every_steps`, and all incomplete
    folders stay."""
    folder = tmp_path_factory.mktemp("run")
    for step in steps:
        (folder / f"step-{step}").mkdir()
        if step not in incomplete:
            (folder / f"step-{step}" / "manifest.json").write_text("{}")
    (folder / ".writing-step-41-aa").mkdir()
    (folder / "damaged-step-1").mkdir()
    prune_checkpoints(folder, num_newest, every_steps)
    complete = steps - incomplete
    expected = set()
    for step in steps:
        num_newer = sum(other > step for other in complete)
        is_newest = num_newest == 0 or num_newer < num_newest
        is_multiple = bool(every_steps) and step % every_steps == 0
        if step in incomplete or is_newest or is_multiple:
            expected.add(step)
    assert ({p.name for p in folder.iterdir()}
            == {f"step-{s}" for s in expected} | {".writing-step-41-aa", "damaged-step-1"})


def test_prune_keeps_adapter_bases(run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoints"
    protect_adapter_base(folder / "step-5")
    prune_checkpoints(folder, 1)
    assert {p.name for p in folder.iterdir()} == {"step-5", "step-100"}
    assert find_damage(folder / "step-5") is None
    (folder / "step-5" / ADAPTER_BASE_MARKER).unlink()
    prune_checkpoints(folder, 1)
    assert {p.name for p in folder.iterdir()} == {"step-100"}
    with create_artifact(tmp_path / "imported", CHECKPOINT_KIND):
        pass
    protect_adapter_base(tmp_path / "imported")
    assert not (tmp_path / "imported" / ADAPTER_BASE_MARKER).exists(), "nothing prunes it"


def test_rollback_renames_adapter_bases(run: Path) -> None:
    folder = run / "checkpoints"
    base = AdapterBase.from_checkpoint(folder / "step-100")
    protect_adapter_base(folder / "step-100")
    delete_checkpoints_after(folder, 5)
    assert {p.name for p in folder.iterdir()} == {"step-5", "taken-back-step-100"}
    assert latest_checkpoint(folder) == folder / "step-5", "the run goes on from what is good"
    adapter = folder.parent / "adapter"
    assert find_adapter_base(adapter, base) == folder / "taken-back-step-100"
    with create_artifact(folder / "step-100", "checkpoint") as repeated:  # the run comes by once more
        repeated.content = {"step": 100}
    assert find_adapter_base(adapter, base) == folder / "taken-back-step-100"
    assert find_adapter_base(adapter, AdapterBase.from_checkpoint(folder / "step-100")) == folder / "step-100"
    protect_adapter_base(folder / "step-100")
    delete_checkpoints_after(folder, 5)
    assert len(list(folder.glob("taken-back-step-100*"))) == 2
    with pytest.raises(UserError, match="has become another checkpoint since"):
        find_adapter_base(adapter, AdapterBase(base.path, "0" * 64))
    with pytest.raises(UserError, match="which is not there"):
        find_adapter_base(adapter, AdapterBase(folder / "step-7", base.sha256))


def test_kill_during_deletion_leaves_no_partial_checkpoint(
        run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def delete_manifest_then_stop(path: Path, **options: bool) -> None:
        (path / "manifest.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", delete_manifest_then_stop)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(run / "checkpoints", 2)
    monkeypatch.undo()
    assert {p.name for p in (run / "checkpoints").glob("step-*")} == {"step-10", "step-100"}
    delete_leftovers(run / "checkpoints")
    assert len(list((run / "checkpoints").iterdir())) == 2


def create_kind_folder(path: Path, kind: str) -> Path:
    """Create a folder with the files of an artifact kind."""
    files = {"run": ["events.jsonl", "config.json"], "hf_model": ["config.json", "model.safetensors"],
             "peft_adapter": ["adapter_config.json", "adapter_model.safetensors"]}
    if kind in files:
        path.mkdir()
        for name in files[kind]:
            (path / name).touch()
    else:
        with create_artifact(path, kind):
            pass
    return path


COMMANDS = {"to-hf": (("checkpoint", "run"), lambda path, out: convert.to_hf(path, out)),
            "from-hf": (("hf_model",), lambda path, out: convert.from_hf(path, out)),
            "to-peft": (("checkpoint", "run"), to_peft),
            "from-peft": (("peft_adapter",), lambda path, out: from_peft(path, out, path)),
            "--from, average, status": (("checkpoint", "run"), lambda path, out: find_checkpoint(path)),
            "report": (("run",), lambda path, out: read_run(path)),
            "generate, eval": (("checkpoint", "run", "hf_model"), lambda path, out: find_target(path)),
            "verify, inspect": (("checkpoint", "run", "hf_model"), lambda path, out: open_weights(path))}
UNKNOWN = {"empty": ((), "is empty"), "read": (("README.md",), "holds README.md alone, and neither a model"),
           "text": (("a.txt", "b.txt"), r"holds text .a.txt and 1 more., .*`sov-data pack --input` takes it"),
           "words": (("tokenizer.json",), "is a tokenizer without a model .*`sov-tokenizer import` takes it")}


@pytest.mark.each("command", COMMANDS)
def test_unknown_folder_error_describes_content(command: str, tmp_path: Path) -> None:
    for name, (files, description) in UNKNOWN.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
        with pytest.raises(UserError, match=rf"{name}: {description}.* pass (the folder|RUN|a folder|what)"):
            COMMANDS[command][1](tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.each("command", COMMANDS)
def test_other_folder_kind_error_names_command(command: str, tmp_path: Path) -> None:
    kinds, call = COMMANDS[command]
    for kind in sorted(set(KIND_CONSUMERS) - set(kinds)):
        folder = create_kind_folder(tmp_path / kind, kind)
        files_before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=rf"{kind}: is {KIND_CONSUMERS[kind][0]}, not an? .*; ."):
            call(folder, tmp_path / "out")
        assert sorted(tmp_path.rglob("*")) == files_before
