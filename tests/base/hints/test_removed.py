"""Removed commands, options, settings and files are refused by name, with their replacement."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sov import recipes
from megatron_sov.base.artifacts import create_artifact, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.base.hints import removed
from megatron_sov.base.settings import SettingsError
from megatron_sov.cli import main
from megatron_sov.model.config import apply_settings, from_dict
from megatron_sov.model.config.run import setting_names

PROGRAMS = {"megatron-sov": "megatron_sov.cli", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}


def run(typed: str) -> int:
    program, *words = typed.split()
    main: Callable[[list[str]], int] = importlib.import_module(PROGRAMS[program]).main
    return main(words)


@pytest.mark.each("typed", list(removed.COMMANDS))
@pytest.mark.each("more", ["", " --help", " commit RUN --log x.jsonl"])
def test_a_removed_command_is_refused_with_its_replacement(typed: str, more: str,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert run(typed + more) == 2
    successor = removed.COMMANDS[typed]
    sentence = successor.partition(": `")[0] if "{first}" in successor else successor
    assert f"{typed}: was removed in this version; {sentence}" in capsys.readouterr().err


@pytest.mark.each("typed", list(removed.OPTIONS))
@pytest.mark.each("more", [" x", "=x", ""])
def test_a_removed_option_is_refused_with_its_replacement(typed: str, more: str,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    assert run(typed + more) == 2
    error, successor = capsys.readouterr().err, removed.OPTIONS[typed]
    assert f"{typed}: was removed in this version; " in error
    # another command takes the typed words
    begin = "  megatron-sov rl run --set policy.method=preference" if "use `megatron-sov" in successor else ""
    assert (begin or f"this version; {successor}") in error


def test_rounds_of_preferences_are_rl_rounds_with_the_typed_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("megatron-sov prefer --from hf --method ipo --prompts p.jsonl --reward math --run r") == 2
    expected = ("\n  megatron-sov rl run --set policy.method=preference --set rollout.steps_per_round=2 "
                "--from hf --set preference.method=ipo --prompts p.jsonl --reward math --run r --store ")
    assert expected in capsys.readouterr().err


def test_the_model_of_an_endpoint_is_refused_with_the_endpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("megatron-sov eval lm http://localhost:1/v1 --model M --tasks t --output o") == 2
    assert "eval lm --model: was removed" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["rl", "store", "audit"], ["inspect", "audit"], ["report", "card"]])
def test_a_removed_command_name_is_a_plain_word_elsewhere(words: list[str],
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "was removed" not in capsys.readouterr().err


@pytest.mark.each("name", list(removed.SETTINGS))
def test_a_removed_setting_is_refused_unless_an_old_run_has_its_default(name: str) -> None:
    config = apply_settings(recipes.get("tiny-qwen3"), ["model.yarn={}"])
    assert name not in setting_names()
    with pytest.raises(SettingsError, match="it was removed in this version; ") as error:
        apply_settings(config, [f"{name}=1"])
    assert removed.SETTINGS[name][1] in str(error.value) and name in str(error.value)

    saved = config.to_dict()
    *groups, last = name.split(".")
    block = saved
    for group in groups:
        block = block[group]
    block[last] = removed.SETTINGS[name][0]
    assert from_dict(saved) == config and last in block, "what was read is not changed"
    block[last] = "another"
    with pytest.raises(SettingsError, match="it was removed in this version"):
        from_dict(saved)


@pytest.mark.parametrize("raw", [{"data": 7}, {"data": None}, {}, {"data": {"phases": 3}}])
def test_settings_of_another_form_pass_to_the_reader(raw: dict[str, object]) -> None:
    assert removed.update_settings(raw) == raw


@pytest.mark.parametrize("file", list(removed.FOLDERS))
def test_a_folder_of_a_removed_command_is_refused_by_every_command(
        file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / file).write_text("{}")
    for words in (["inspect"], ["status"], ["convert", "inspect"], ["report"]):
        assert main([*words, str(tmp_path)]) == 2
        errors = capsys.readouterr().err
        owner, replacement = removed.FOLDERS[file]
        assert f"holds {file} of {owner}, which was removed in this version" in errors, words
        assert replacement in errors


@pytest.mark.parametrize("kind", list(removed.KINDS))
def test_an_artifact_of_a_removed_kind_is_refused(kind: str, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    with create_artifact(tmp_path / "old", kind) as artifact:
        (artifact.path / "rows").write_text("1\n")
    assert main(["inspect", str(tmp_path / "old")]) == 2
    message = f"is a '{kind}' artifact, which this version cannot read; {removed.KINDS[kind]}"
    assert message in capsys.readouterr().err
    with pytest.raises(UserError, match=f"is a '{kind}' artifact where a 'tokens' artifact is needed"):
        read_manifest(tmp_path / "old", "tokens")


@pytest.mark.parametrize(("words", "value"), [
    (["rl", "run", "tiny-qwen3", "--engine", "sglang"], "sglang"),
    (["generate", "x", "--prompt", "y", "--engine", "sglang"], "sglang"),
    (["tools", "run", "mcp"], "mcp"), (["tools", "run", "openenv"], "openenv"),
    (["tools", "run", "nemo_gym"], "nemo_gym"), (["tools", "run", "functions"], "functions"),
    (["tools", "run", "tickets"], "tickets")])
def test_a_removed_value_is_refused_with_its_replacement(words: list[str], value: str,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "tools":
        Path("t.jsonl").write_text('{"question": "1?", "answer": "1"}\n')
        words += ["model", "--output", "out", "--tasks", "t.jsonl"]
    if words[0] == "rl":
        words += ["--from", "x", "--prompts", "p", "--reward", "math", "--store", "s", "--run", "r"]
    assert main(words) == 2
    assert f"it was removed in this version: {removed.VALUES[value]}" in capsys.readouterr().err
