"""Damaged checkpoints: any damage to any file is detected, and the run loads the previous checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import MANIFEST, read_manifest
from megatron_sov.cli import main
from megatron_sov.runs.checkpoints import find_damage
from megatron_sov.runs.obs.events import read_events
from tests.breakers import flip_bit
from tests.run_files import read_run_events

STEPS = 8
SETTINGS = (f"train.steps={STEPS}", "train.checkpoint_every_steps=1", "train.keep_checkpoints=0",
            "train.eval_every_steps=0", "train.hidden_dropout=0.1")
EP2 = ("--nproc", "2", "--set", "parallel.ep=2")


def truncate_file(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def delete_file(file: Path) -> None:
    file.unlink()


DAMAGES = (truncate_file, flip_bit, delete_file)


def get_checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step}"


def hashes(run: Path, step: int) -> dict[str, str]:
    """Return file name -> digest; for `state.json`, the content without `wall_s`, which differs per run."""
    state = json.loads((get_checkpoint_folder(run, step) / "state.json").read_text())
    files = read_manifest(get_checkpoint_folder(run, step)).files
    return {name: record.digest for name, record in files.items() if name != "state.json"} | {
        "state.json": json.dumps({k: v for k, v in state.items() if k != "wall_s"}, sort_keys=True)}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, pretrain: Any, run_command: Any) -> Path:
    """Return a run on two processes that has a checkpoint of every step."""
    run = tmp_path_factory.mktemp("kept") / "run"
    result = run_command(*pretrain(run, *EP2, settings=SETTINGS))
    assert result.returncode == 0, result.stderr
    return run


@pytest.mark.distributed
@pytest.mark.essential
def test_the_newest_valid_checkpoint_resumes_to_the_same_bits(tmp_path: Path, pretrain: Any, run_command: Any,
                                                              kept: Path) -> None:
    """Damages one kind of file after another, from the newest checkpoint back to step 2."""
    at_once = tmp_path / "at-once"
    assert run_command(*pretrain(at_once, *EP2,
                                 settings=(*SETTINGS, "train.async_save=false"))).returncode == 0
    assert all(hashes(at_once, step) == hashes(kept, step) for step in range(1, STEPS + 1)), (
        "in the background or at once")

    broken = tmp_path / "broken"
    shutil.copytree(kept, broken)
    (broken / "complete.json").unlink()
    in_the_way = {8: ("optimizer/00000/rank-00001-00000.safetensors", truncate_file),
                  7: ("model.index.json", flip_bit), 6: ("state.json", delete_file), 5: (MANIFEST, flip_bit),
                  4: ("tokenizer/tokenizer.json", truncate_file), 3: (MANIFEST, delete_file)}
    for step, (name, spoil) in in_the_way.items():
        spoil(get_checkpoint_folder(broken, step) / name)
    (broken / "checkpoints" / ".writing-step-9-0a1b2c3d").mkdir()
    result = run_command(*pretrain(broken, *EP2, "--resume", settings=SETTINGS))
    assert result.returncode == 0, result.stderr
    found = [e for e in read_events(broken / "events.jsonl")
             if e["event"] in ("damaged_checkpoint", "resume")]
    assert [e.get("path") for e in found] == [*(f"checkpoints/step-{step}" for step in in_the_way), None]
    for event, (step, (name, _)) in zip(found, in_the_way.items(), strict=False):
        assert f"checkpoints/step-{step}/{name}: " in event["reason"]
        assert f"warning: {event['reason']}; step-{step} is renamed to damaged-step-{step}" in result.stderr
        assert (broken / "checkpoints" / f"damaged-step-{step}").is_dir(), "never deleted"
    assert found[-1]["reason"] == "continued from step-2"
    assert all(hashes(broken, step) == hashes(kept, step) for step in range(1, STEPS + 1))
    assert not list((broken / "checkpoints").glob(".*"))

    lost = tmp_path / "lost"
    shutil.copytree(kept, lost, ignore=shutil.ignore_patterns("step-[2-8]"))
    (lost / "complete.json").unlink()
    delete_file(get_checkpoint_folder(lost, 1) / "state.json")
    for _ in range(2):  # and it stays refused
        result = run_command(*pretrain(lost, *EP2, "--resume", settings=SETTINGS))
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert ("no sound checkpoint is left (damaged-step-1); restore one from a copy as step-N"
                in result.stderr)


def test_every_damage_to_every_file_is_detected(kept: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step-8"
    shutil.copytree(get_checkpoint_folder(kept, STEPS), path)
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    assert {Path(n).suffix for n in names} >= {".safetensors", ".json"} and len(names) >= 9
    for name in names:
        for spoil in DAMAGES:
            content = (path / name).read_bytes()
            spoil(path / name)
            problem = find_damage(path)
            assert problem is not None and problem.startswith(f"{path / name}: "), (
                name, spoil.__name__, problem)
            (path / name).write_bytes(content)
    assert find_damage(path) is None


@pytest.mark.parametrize("command",
                         [("convert", "to-hf", "RUN", "OUT"), ("generate", "RUN", "--prompt", "a")])
@pytest.mark.parametrize("name", [MANIFEST, "model/00000/rank-00000-00000.safetensors"])
def test_commands_name_the_file_and_the_checkpoint_before(kept: Path, tmp_path: Path,
                                                          capfd: pytest.CaptureFixture[str],
                                                          command: tuple[str, ...], name: str,
                                                          one_rank: None) -> None:
    for step in (6, 7, 8):
        shutil.copytree(get_checkpoint_folder(kept, step), get_checkpoint_folder(tmp_path / "run", step))
    delete_file(get_checkpoint_folder(tmp_path / "run", 7) / MANIFEST)
    flip_bit(get_checkpoint_folder(tmp_path / "run", 8) / name)
    argv = [{"RUN": str(tmp_path / "run"), "OUT": str(tmp_path / "out")}.get(part, part) for part in command]
    try:
        code = main(argv)
    except SystemExit as e:
        code = e.code
    stderr = capfd.readouterr().err
    assert code == 2 and f"{get_checkpoint_folder(tmp_path / 'run', 8) / name}: " in stderr, stderr
    assert (f"use the checkpoint before it, {get_checkpoint_folder(tmp_path / 'run', 6)}" in stderr
            and not (tmp_path / "out").exists())


def test_a_run_does_not_start_from_a_damaged_one(kept: Path, tmp_path: Path, pretrain: Any,
                                                 run_command: Any) -> None:
    shutil.copytree(get_checkpoint_folder(kept, 8), get_checkpoint_folder(tmp_path / "run", 8))
    truncate_file(get_checkpoint_folder(tmp_path / "run", 8) / "model/00000/rank-00000-00000.safetensors")
    result = run_command(*pretrain(tmp_path / "new", "--from", str(tmp_path / "run"), settings=SETTINGS))
    assert result.returncode == 2 and ("there is no checkpoint before it; restore it from "
                                       "a copy") in result.stderr, result.stderr
    assert not (tmp_path / "new").exists()


# A full disk: one message, exit code 2, no partial file, and the run can resume.


FULL_DISK = ("train.steps=4", "train.checkpoint_every_steps=2")


def test_a_checkpoint_that_does_not_fit(tmp_path: Path, pretrain: Any, run_command: Any) -> None:
    run = tmp_path / "run"
    result = run_command(*pretrain(run, "--nproc", "2", settings=FULL_DISK), file_limit_bytes=100_000)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("\nerror: ") + result.stderr.startswith(
        "error: ") == 1, result.stderr
    assert "free some space" in result.stderr
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "command.json", "config.json",
                                                   "events.jsonl"]
    assert list((run / "checkpoints").iterdir()) == []
    again = run_command(*pretrain(run, "--nproc", "2", "--resume", settings=FULL_DISK))
    assert again.returncode == 0, again.stderr
    steps = [e["step"] for e in read_run_events(run, "step")]
    assert steps[-4:] == [1, 2, 3, 4] and 2 <= len(steps) - 4 <= 4, (
        "it may go on while the checkpoint is written")


def test_events_that_do_not_fit(tmp_path: Path, pretrain: Any, run_command: Any) -> None:
    result = run_command(*pretrain(tmp_path / "run", settings=("train.steps=40",)), file_limit_bytes=9_000)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("error: ") == 1, result.stderr
    assert "events.jsonl: larger than the limit on file sizes" in result.stderr
