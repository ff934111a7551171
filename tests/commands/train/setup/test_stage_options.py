"""From a command line to the settings of a stage: every mistake is reported before any work."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from megatron_sov import recipes
from megatron_sov.base.artifacts import format_json
from megatron_sov.base.errors import UserError
from megatron_sov.commands.train.setup.stage_options import PretrainOptions, SftOptions
from megatron_sov.commands.train.setup.starts import find_start
from megatron_sov.commands.train.setup.training import check_stage, stage_request
from megatron_sov.commands.train.training_run import convert_request_start
from megatron_sov.engine.parallel import launcher
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.model.recipes.requested import request_training
from tests.packing import Packed
from tests.typed_words import parse_settings


def parse_options(*argv: str) -> PretrainOptions:
    return parse_settings(PretrainOptions, [*argv, "--run", "r"])


def parse_config(*argv: str) -> RunConfig:
    return check_stage(parse_options(*argv)).config


@pytest.fixture
def data(tmp_path: Path, token_shards: Path) -> Path:
    for name in ("a", "b:2"):
        shutil.copytree(token_shards, tmp_path / name)
    return tmp_path


def test_tuning_without_a_recipe_takes_settings_of_the_start() -> None:
    assert [parse_options("--from", "s").model_settings(objective) is not None
            for objective in ("sft", "lm", None)
            ] == [True, False, False]
    assert parse_options("tiny-k-exaone").model_settings("sft") is None


def test_settings_override_the_recipe(data: Path) -> None:
    args = parse_options("tiny-k-exaone", "--data", f"{data}/a:3", "--set", "train.steps=7")
    config = stage_request(args, "lm").config(["train.steps=5", "train.micro_batch_size=1"])
    assert (config.train.steps, config.train.micro_batch_size, config.data.paths) == (
        7, 1, {f"{data}/a": 3.0})
    assert (config.recipe, config.objective.name) == ("tiny-k-exaone", "lm")
    assert not config.train.deterministic
    assert stage_request(args, "lm").config(own=["train.steps=9"]).train.steps == 9


def test_deterministic_is_a_setting_with_a_flag(data: Path) -> None:
    assert parse_config("tiny-k-exaone", "--data", f"{data}/a", "--deterministic").train.deterministic


def test_a_run_config_replaces_the_recipe_with_equal_settings(data: Path) -> None:
    first = parse_config("tiny-k-exaone", "--data", f"{data}/a:3", "--set", "train.steps=7",
                         "--deterministic")
    (data / "config.json").write_text(format_json(first.to_dict()))
    assert parse_config("--config", str(data / "config.json")) == first
    changed = parse_config("--config", str(data / "config.json"), "--data", f"{data}/b:2", "--set",
                           "train.steps=8")
    assert (changed.data.paths, changed.train.steps) == ({f"{data}/b:2": 1.0}, 8)
    assert changed.train.deterministic


def test_pretraining_configs_serve_fine_tuning_but_not_vice_versa(data: Path, packed_data: Packed) -> None:
    lm = recipes.get("tiny-qwen3")
    for name, config in {"lm": lm, "sft": apply_settings(lm, ["objective.name=sft"])}.items():
        (data / f"{name}.json").write_text(format_json(config.to_dict()))
    arguments = ("--data", str(packed_data.chats))
    options = parse_settings(SftOptions,
                             ["--config", str(data / "lm.json"), *arguments, "--run", "r", "--from", "s"])
    assert check_stage(dataclasses.replace(options, start_from=None)).config.objective.name == "sft"
    with pytest.raises(UserError, match=r"objective.name = sft:"):
        parse_config("--config", str(data / "sft.json"), *arguments)


def test_a_recipe_is_lengthened_before_it_is_tuned(data: Path) -> None:
    arguments = parse_options("tiny-vibethinker", "--data", f"{data}/a")
    assert recipes.get("tiny-vibethinker").objective.name == "sft"
    assert request_training(arguments, "lm", lengthens=True).config().objective.name == "lm"
    with pytest.raises(UserError, match="this command trains with 'lm'"):
        request_training(arguments, "lm").config()
    tuned = parse_options("tiny-typhoon-s", "--data", f"{data}/a")  # which has no stages
    with pytest.raises(UserError, match="this command trains with 'lm'"):
        request_training(tuned, "lm", lengthens=True).config()


def test_data_named_in_a_config_must_exist(data: Path) -> None:
    config = apply_settings(recipes.get("tiny-qwen3"), ['data.paths={"/gone": 1}'])
    (data / "config.json").write_text(format_json(config.to_dict()))
    with pytest.raises(UserError, match=r"--data /gone: does not exist"):
        parse_config("--config", str(data / "config.json"))
    with pytest.raises(UserError, match=r"--data: is missing"):
        parse_config("tiny-qwen3")


@pytest.mark.parametrize(("recipe", "setting", "message"), [
    ("tiny-solar", "train.steps=1", "recipe 'tiny-solar': does not exist; did you mean 'tiny-solar-open'"),
    ("tiny-solar-open", "objective.name=sft",
     "objective.name = sft: this command trains with 'lm'.*`megatron-sov sft`"),
    ("tiny-solar-open", "objective.name=ml", "objective 'ml': does not exist; did you mean 'lm'"),
    ("tiny-solar-open", "objective.options.gamma=2",
     "objective.options.gamma = 2 has no effect with objective.name = \"lm\""),
    ("tiny-solar-open", "model.family=solar-open",
     "model family 'solar-open': is not supported; did you mean 'solar_open'"),
])
def test_bad_settings_are_refused(data: Path, recipe: str, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(recipe, "--data", f"{data}/a", "--set", setting)
    with pytest.raises(UserError, match=message):  # as a job is submitted, before its data is there
        request_training(parse_options(recipe, "--data", "not-yet", "--set", setting), "lm").config()


def test_mistakes_are_found_before_a_hf_folder_is_converted(data: Path, hf_models: dict[str, Path],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(*_: object) -> int:
        raise AssertionError("converted")

    monkeypatch.setattr(launcher, "run_in_fork", convert)
    start = ("--data", f"{data}/a", "--from", str(hf_models["solar_open"]))
    for arguments, message in {
        ("tiny-qwen3", *start): "is a solar_open model, recipe tiny-qwen3 is for qwen3; .*tiny-solar-open",
        ("tiny-solar-open", *start, "--set", "train.stpes=1"): "did you mean 'train.steps'",
        ("tiny-solar-open", *start, "--nproc", "3", "--set", "parallel.tp=3"): "parallel.tp = 3 must divide",
        ("tiny-solar-open", *start, "--inject", "crash@step=x"): "--inject crash@step=x",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_config(*arguments)
    request = check_stage(parse_options("tiny-solar-open", *start))
    assert request.start == hf_models["solar_open"]
    with pytest.raises(AssertionError, match="converted"):
        convert_request_start(request)


def test_from_must_be_something_to_start_from(data: Path) -> None:
    with pytest.raises(UserError, match=r"--from .*none: does not exist"):
        find_start(data / "none")
    (data / "c").mkdir()
    with pytest.raises(UserError, match="run; pass RUN"):
        find_start(data / "c")
    (data / "c" / "checkpoints").mkdir()
    with pytest.raises(UserError, match="complete checkpoint yet"):
        find_start(data / "c")
