"""`megatron-sov tools`: the examples in docs/tools.md, a model that plays episodes, and messages about
mistakes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import find_damaged_files, read_manifest
from megatron_sov.judge.tools.environment import FAULTS
from megatron_sov.judge.tools.registry import BUILT_IN, ENVIRONMENT_PLUGINS
from megatron_sov.work.progress.journal import open_journal
from tests.judge.tools.fuzzed_episodes import BEGIN, END, TEMPLATE, build_small_encoder

PAGE = Path(__file__).parents[3] / "docs/tools.md"


@pytest.fixture(autouse=True)
def folder(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, without the environment plugins that another test registered."""
    monkeypatch.setattr(ENVIRONMENT_PLUGINS, "_known", {})
    return cwd


def test_the_page_is_true(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    text = PAGE.read_text()
    # write the files that the page shows, and run its two Python examples
    for name, content in re.findall(r"^`([a-z_.]+)`:\n\n```[a-z]+\n(.*?)^```", text,
                                    re.MULTILINE | re.DOTALL):
        Path(name).write_text(content)
    for name in ("try_virtual", "my_try"):
        exec(Path(f"{name}.py").read_text(), {})
    assert capsys.readouterr().out.endswith("1.0\n1.0\n")
    fault_table = text.partition("## Call faults")[2]
    faults = {name for row in re.findall(r"^\| (`.*?) \| ", fault_table, re.MULTILINE)
              for name in re.findall(r"`(\w+)`", row)}
    assert faults == set(FAULTS)
    assert all(f"| `{name}` |" in text for name in BUILT_IN)


@pytest.mark.each("words, message", [
    (["calculators"], "did you mean 'calculator'"),
    (["tickets"], "use `virtual`, whose tasks describe tables and tools in Python"),
    (["calculator", "--set", "relative=1"], "relative: no such setting"),
    (["calculator", "--limit", "max_turn=1"], "did you mean 'max_turns'"),
    (["retrieval"], "corpus: is missing; it has no default; set it"),
    (["calculator", "--tasks", "none.jsonl"], "none.jsonl: does not exist"),
    (["calculator", "--tasks", "tasks.jsonl"], "tasks.jsonl:2: is a JSON list, must be an object"),
    (["calculator"], "nowhere")])
def test_mistakes_are_one_sentence(words: list[str], message: str, get_refusal: Any) -> None:
    Path("tasks.jsonl").write_text('{"question": "?", "answer": "1"}\n[1]\n')
    # refused before a model is loaded
    assert message in get_refusal("tools", "run", words[0], "nowhere", "--output", "out", *words[1:])


def test_a_model_plays_and_leaves_rows_figures_and_limits(hf_models: dict[str, Path], folder: Path,
                                                          get_refusal: Any, read_output: Any) -> None:
    model = folder / "model"
    shutil.copytree(hf_models["solar_open"], model)
    chat = build_small_encoder()
    chat._with_special.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "bos_token": BEGIN}))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    words = ["tools", "run", "calculator", "model", "--output", "out", "--limit", "max_response_tokens=12",
             "--limit", "max_prompt_tokens=460", "--limit", "max_turn_tokens=20"]
    assert "more than max_prompt_tokens 9" in get_refusal(*words, "--limit", "max_prompt_tokens=9")
    out = read_output(*words)
    rows = [json.loads(line) for line in Path("out/episodes.jsonl").read_text().splitlines()]
    assert [(row["reward"], row["status"]) for row in rows] == [(0.0, "scored")] * 2
    for row in rows:  # a random model may or may not end its turn
        ((start, end),) = row["spans"]
        assert end == len(row["ids"]) and len(row["logprobs"][0]) == end - start <= 12
        assert row["end"] == ("answered" if chat.end_ids()[0] == row["ids"][-1] else "unended")
    manifest = read_manifest("out", "episodes")
    assert manifest.content["limits"]["max_response_tokens"] == 12 and not find_damaged_files("out")
    assert "calculator: 2 episodes (" in out and "max_response_tokens 12" in out
    assert "already exists" in get_refusal(*words)

    # an interrupted run is not continued with a changed tokenizer folder
    settings = {name: value for name, value in manifest.settings.items()
                if name not in ("environment_name", "settings")}
    with pytest.raises(KeyboardInterrupt), open_journal(Path("begun"), "tools run", settings) as journal:
        journal.add([(0, b"{}")])
        raise KeyboardInterrupt
    (model / "special_tokens_map.json").write_text(json.dumps({"bos_token": BEGIN}))
    words[words.index("out")] = "begun"
    assert "model.chat.special_tokens_map.json was" in get_refusal(*words)
