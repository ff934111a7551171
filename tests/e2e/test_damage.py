"""Damage to any file of a checkpoint is detected, and a resumed run loads the checkpoint before it."""

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


DAMAGE_FUNCTIONS = (truncate_file, flip_bit, delete_file)


def get_checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step}"


def read_hashes(run: Path, step: int) -> dict[str, str]:
    """Return the hash of each file of a checkpoint by file name; of `state.json` its text without `wall_s`,
    the run's time in seconds, which no two runs share."""
    state = json.loads((get_checkpoint_folder(run, step) / "state.json").read_text())
    files = read_manifest(get_checkpoint_folder(run, step)).files
    return {name: record.digest for name, record in files.items() if name != "state.json"} | {
        "state.json": json.dumps({k: v for k, v in state.items() if k != "wall_s"}, sort_keys=True)}


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory: pytest.TempPathFactory, pretrain: Any, run_checked: Any) -> Path:
    """A complete run on two processes with a checkpoint of every step."""
    run = tmp_path_factory.mktemp("complete") / "run"
    run_checked(*pretrain(run, *EP2, settings=SETTINGS))
    return run


@pytest.mark.distributed
@pytest.mark.essential
def test_the_newest_valid_checkpoint_resumes_to_the_same_bits(tmp_path: Path, pretrain: Any, run_checked: Any,
                                                              complete_run: Path) -> None:
    """Damages another kind of file in each checkpoint from the newest back to step 3: step 2 is loaded."""
    synchronous = tmp_path / "at-once"
    run_checked(*pretrain(synchronous, *EP2, settings=(*SETTINGS, "train.async_save=false")))
    assert all(read_hashes(synchronous, step) == read_hashes(complete_run, step)
               for step in range(1, STEPS + 1)), "written before the next step, or in the background"

    broken = tmp_path / "broken"
    shutil.copytree(complete_run, broken)
    (broken / "complete.json").unlink()
    damages = {8: ("optimizer/00000/rank-00001-00000.safetensors", truncate_file),
               7: ("model.index.json", flip_bit), 6: ("state.json", delete_file), 5: (MANIFEST, flip_bit),
               4: ("tokenizer/tokenizer.json", truncate_file), 3: (MANIFEST, delete_file)}
    for step, (name, damage_file) in damages.items():
        damage_file(get_checkpoint_folder(broken, step) / name)
    (broken / "checkpoints" / ".writing-step-9-0a1b2c3d").mkdir()
    result = run_checked(*pretrain(broken, *EP2, "--resume", settings=SETTINGS))
    found = [e for e in read_events(broken / "events.jsonl")
             if e["event"] in ("damaged_checkpoint", "resume")]
    assert [e.get("path") for e in found] == [*(f"checkpoints/step-{step}" for step in damages), None]
    for event, (step, (name, _)) in zip(found, damages.items(), strict=False):
        assert f"checkpoints/step-{step}/{name}: " in event["reason"]
        assert f"warning: {event['reason']}; step-{step} is renamed to damaged-step-{step}" in result.stderr
        assert (broken / "checkpoints" / f"damaged-step-{step}").is_dir(), "never deleted"
    assert found[-1]["reason"] == "continued from step-2"
    assert all(read_hashes(broken, step) == read_hashes(complete_run, step) for step in range(1, STEPS + 1))
    assert not list((broken / "checkpoints").glob(".*"))

    lost = tmp_path / "lost"
    shutil.copytree(complete_run, lost, ignore=shutil.ignore_patterns("step-[2-8]"))
    (lost / "complete.json").unlink()
    delete_file(get_checkpoint_folder(lost, 1) / "state.json")
    for _ in range(2):  # the second attempt fails like the first
        result = run_checked(*pretrain(lost, *EP2, "--resume", settings=SETTINGS), code=2)
        assert "Traceback" not in result.stderr
        assert ("no sound checkpoint is left (damaged-step-1); restore one from a copy as step-N"
                in result.stderr)


def test_every_damage_to_every_file_is_detected(complete_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step-8"
    shutil.copytree(get_checkpoint_folder(complete_run, STEPS), path)
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    assert {Path(n).suffix for n in names} >= {".safetensors", ".json"} and len(names) >= 9
    for name in names:
        for damage_file in DAMAGE_FUNCTIONS:
            content = (path / name).read_bytes()
            damage_file(path / name)
            problem = find_damage(path)
            assert problem is not None and problem.startswith(f"{path / name}: "), (
                name, damage_file.__name__, problem)
            (path / name).write_bytes(content)
    assert find_damage(path) is None


@pytest.mark.parametrize("command",
                         [("convert", "to-hf", "RUN", "OUT"), ("generate", "RUN", "--prompt", "a")])
@pytest.mark.parametrize("name", [MANIFEST, "model/00000/rank-00000-00000.safetensors"])
def test_commands_name_the_file_and_the_checkpoint_before(complete_run: Path, tmp_path: Path,
                                                          capfd: pytest.CaptureFixture[str],
                                                          command: tuple[str, ...], name: str,
                                                          one_rank: None) -> None:
    for step in (6, 7, 8):
        shutil.copytree(get_checkpoint_folder(complete_run, step),
                        get_checkpoint_folder(tmp_path / "run", step))
    delete_file(get_checkpoint_folder(tmp_path / "run", 7) / MANIFEST)
    flip_bit(get_checkpoint_folder(tmp_path / "run", 8) / name)
    argv = [{"RUN": str(tmp_path / "run"), "OUT": str(tmp_path / "out")}.get(part, part) for part in command]
    try:
        code = main(argv)
    except SystemExit as e:
        code = e.code
    stderr = capfd.readouterr().err
    assert code == 2 and f"{get_checkpoint_folder(tmp_path / 'run', 8) / name}: " in stderr, stderr
    assert f"use the checkpoint before it, {get_checkpoint_folder(tmp_path / 'run', 6)}" in stderr
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_start_from_a_damaged_one(complete_run: Path, tmp_path: Path, pretrain: Any,
                                                 run_checked: Any) -> None:
    shutil.copytree(get_checkpoint_folder(complete_run, 8), get_checkpoint_folder(tmp_path / "run", 8))
    truncate_file(get_checkpoint_folder(tmp_path / "run", 8) / "model/00000/rank-00000-00000.safetensors")
    command = pretrain(tmp_path / "new", "--from", str(tmp_path / "run"), settings=SETTINGS)
    result = run_checked(*command, code=2)
    assert "there is no checkpoint before it; restore it from a copy" in result.stderr
    assert not (tmp_path / "new").exists()


# A full disk ends a run with one message, exit code 2 and no partial file, and the run can resume. A limit on
# the size of a file stands in for the full disk.

FULL_DISK = ("train.steps=4", "train.checkpoint_every_steps=2")


def test_a_checkpoint_that_does_not_fit(tmp_path: Path, pretrain: Any, run_command: Any,
                                        run_checked: Any) -> None:
    run = tmp_path / "run"
    result = run_command(*pretrain(run, "--nproc", "2", settings=FULL_DISK), file_limit_bytes=100_000)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("\nerror: ") + result.stderr.startswith(
        "error: ") == 1, result.stderr
    assert "free some space" in result.stderr
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "command.json", "config.json",
                                                   "events.jsonl"]
    assert list((run / "checkpoints").iterdir()) == []
    run_checked(*pretrain(run, "--nproc", "2", "--resume", settings=FULL_DISK))
    steps = [e["step"] for e in read_run_events(run, "step")]
    assert steps[-4:] == [1, 2, 3, 4] and 2 <= len(steps) - 4 <= 4, (
        "the first run may do steps 3 and 4 while the checkpoint of step 2 is written")


def test_events_that_do_not_fit(tmp_path: Path, pretrain: Any, run_command: Any) -> None:
    result = run_command(*pretrain(tmp_path / "run", settings=("train.steps=40",)), file_limit_bytes=9_000)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("error: ") == 1, result.stderr
    assert "events.jsonl: larger than the limit on file sizes" in result.stderr
