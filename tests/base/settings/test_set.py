"""`--set` of three programs reports equal mistakes with equal messages and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import data_prep.cli
from megatron_sov import cli

COMMANDS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {
    "pretrain": (cli.main, "pretrain tiny-qwen3 --data DIR --run r", "train.steps"),
    "score": (cli.main, "score --reward length --input FILE --output o.jsonl", "max_length"),
    "synth": (data_prep.cli.main, "synth solutions --input FILE --engine http://a:1 --model m --output s",
              "num_draws"),
}
MISTAKES = {
    "{key}": "--set: '{key}' must have the form key=value",
    "{key}=[8": "--set: {key}: [8 begins like JSON but does not parse",
    "{key}x=1": "{key}x: no such setting; did you mean '{key}'?",
    "{key}=many": '{key} = "many" must be a whole number',
    "{key}=null": "{key} = null must be a whole number; give it a value, or leave it out",
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("command", COMMANDS)
def test_set_mistakes_have_equal_messages(
        command: str, mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("DIR").mkdir()
    Path("FILE").write_text('{"response": "a", "text": "a"}\n')
    main, line, key = COMMANDS[command]
    assert main([*line.split(), "--set", mistake.format(key=key)]) == 2
    error = capsys.readouterr().err
    assert MISTAKES[mistake].format(key=key) in error and len(error.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DIR", "FILE"], "nothing is left behind"
