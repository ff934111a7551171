"""From the command line to settings, with every mistake found before the work."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_sov.errors import UserError
from megatron_sov.train.stage_config import add_stage_arguments, resolve_start, stage_config


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_stage_arguments(parser, needs_start=False)
    return parser.parse_args(list(argv))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    (tmp_path / "b:2").mkdir()
    return tmp_path


def test_settings_override_the_recipe(data: Path) -> None:
    config = stage_config(parsed("tiny-k-exaone", "--data", f"{data}/a:3", "--run", "r", "--set", "train.steps=7"), None,
                          defaults=("train.steps=5", "train.micro_batch_size=1"))
    assert (config.train.steps, config.train.micro_batch_size, config.data.paths) == (7, 1, {f"{data}/a": 3.0})
    assert (config.recipe, config.objective.name) == ("tiny-k-exaone", "lm")
    assert not config.train.deterministic


def test_deterministic_is_a_setting_with_a_flag(data: Path) -> None:
    assert stage_config(parsed("tiny-k-exaone", "--data", f"{data}/a", "--run", "r", "--deterministic"), None).train.deterministic


@pytest.mark.parametrize(("recipe", "setting", "message"), [
    ("tiny-solar", "train.steps=1", "recipe 'tiny-solar': does not exist; did you mean 'tiny-solar-open'"),
    ("tiny-solar-open", "train.step=1", "'train.step' does not exist; did you mean 'steps'"),
    ("tiny-solar-open", "train.steps=many", "train.steps = 'many'"),
    ("tiny-solar-open", "objective.name=sft", "objective.name = sft: this command trains by 'lm'.*`megatron-sov sft`"),
])
def test_bad_settings_are_refused(data: Path, recipe: str, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stage_config(parsed(recipe, "--data", f"{data}/a", "--run", "r", "--set", setting), None)


def test_from_must_be_something_to_start_from(data: Path) -> None:
    assert resolve_start(None, data / "run") is None
    with pytest.raises(UserError, match=r"--from .*none: does not exist"):
        resolve_start(data / "none", data / "run")
    with pytest.raises(UserError, match=r"a: has no manifest.json, so it is not a 'checkpoint' artifact"):
        resolve_start(data / "a", data / "run")
    (data / "a" / "checkpoints").mkdir()
    with pytest.raises(UserError, match="this run has no complete checkpoint yet"):
        resolve_start(data / "a", data / "run")


def test_many_processes_do_not_convert_at_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "a" / "config.json").write_text("{}")
    (data / "a" / "model.safetensors").write_text("")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="run `megatron-sov convert from-hf` before"):
        resolve_start(data / "a", data / "run")
