"""`megatron-sov eval play`: a tiny model, or one behind an endpoint, plays a task with tools; scores are read
as those of `eval lm`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.bench.lm.results import read_items, read_results
from megatron_sov.cli import main
from megatron_sov.infer.turns import EnginePolicy

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from tool_episodes import BEGIN, END, TEMPLATE, chat_encoder

TASK = """
task: sums
custom_dataset: !function megatron_sov.bench.suites.catalogue.load
dataset_path: json
dataset_kwargs: {data_files: {test: "${DATA}/sums.jsonl"}}
output_type: generate_until
metadata:
  sov:
    fields: {question: text, answer: text}
    environment: calculator
    samples: 2
    temperature: 1.0
    metrics: [avg, pass]
"""
LIMITS = "    limits: {max_response_tokens: 12, max_prompt_tokens: 460, max_turn_tokens: 20}\n"


@pytest.fixture
def folder(hf_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(hf_models["solar_open"], model)
    chat_encoder()._with_special.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "bos_token": BEGIN}))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "sums.yaml").write_text(TASK + LIMITS)
    (tmp_path / "data").mkdir()
    rows = [{"question": f"What is {i} + 2?", "answer": str(i + 2)} for i in range(3)]
    (tmp_path / "data/sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


WORDS = ["eval", "play", "model", "--tasks", "sums.yaml", "--data-dir", "data", "--output", "out.json"]


def test_a_model_plays_and_its_scores_are_kept_with_limits(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, "--limit", "2"]) == 0
    assert "sums  avg@2  0.0000  2 items, 0 failed, " in capsys.readouterr().out
    results = read_results(folder / "out.json")
    scores = results.tasks["sums"]
    assert [metric.label for metric in scores.metrics] == ["avg@2", "pass@1", "pass@2"]
    assert [metric.value for metric in scores.metrics] == [0.0, 0.0, 0.0]
    assert scores.agent_limits is not None
    assert scores.agent_limits["max_response_tokens"] == 12
    assert (scores.items, scores.limit, scores.sampling.samples, scores.chat_template) == (2, 2, 2, True)
    assert list(scores.dataset["files"]) == ["sums.jsonl"]
    assert scores.judge is not None
    assert scores.judge.startswith("calculator ")
    items = list(read_items(folder / "out.json", results))
    assert [(item.question, item.answer, len(item.samples)) for item in items] == [
        ("What is 0 + 2?", "2", 2),
        ("What is 1 + 2?", "3", 2),
    ]
    # each has random numbers of its own
    assert items[0].samples[0].response != items[0].samples[1].response
    assert not list(folder.glob(".out.json*"))


def test_a_wish_to_stop_keeps_the_turns_of_a_model_of_ours(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, rounds = EnginePolicy.sample, []

    def stops(policy: EnginePolicy, prompts: Any, max_new_tokens: int, streams: Any) -> Any:
        rounds.append(list(streams))
        if len(rounds) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(policy, prompts, max_new_tokens, streams)

    monkeypatch.setattr(EnginePolicy, "sample", stops)
    words = [*WORDS, "--limit", "2", "--concurrent", "2", "--mode", "no-thinking"]
    assert main(words) == 75
    assert "of 4 episodes have ended, and all turns are kept" in capsys.readouterr().err
    assert len(rounds) == 1
    assert main(words) == 0
    asked = [stream for streams in rounds for stream in streams]
    assert sorted(asked) == sorted(set(asked))  # no turn twice
    assert read_results(folder / "out.json").tasks["sums"].mode == "no-thinking"


@pytest.mark.parametrize(("words", "said"), [
    ({"--tasks": "math500"}, "names 0 tasks with an environment"),
    ({"--tasks": "tau2-like"}, "names 3 tasks with an environment"),
    ({"--tasks": "sms"}, "is none of those"),
    ({"--tasks": "no.yaml"}, "cannot be read"),
    ({"--data-dir": "no"}, "has no sums.jsonl"),
    ({"--samples": "0"}, "--samples 0"),
    ({"--limit": "0"}, "--limit 0"),
    ({"--concurrent": "0"}, "--concurrent 0"),
    ({"--judge": "endpoint"}, "must have the form key=value"),
])
def test_mistakes_are_one_sentence(
    folder: Path, words: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*WORDS, *[word for pair in words.items() for word in pair]]
    assert main(given) == 2
    assert said in capsys.readouterr().err
    assert not (folder / "out.json").exists()


def calculated(payload: dict[str, Any]) -> dict[str, Any]:
    """Call the calculator, then say what it told."""
    *_, last = payload["messages"]
    if last["role"] == "tool":
        message: dict[str, Any] = {"content": last["content"], "reasoning_content": "It says so."}
    else:
        expression = last["content"].removeprefix("What is ").rstrip("?")
        message = {"content": None, "tool_calls": [{"id": "a", "type": "function", "function": {
            "name": "calculate", "arguments": json.dumps({"expression": expression})}}]}
    return {"choices": [{"message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 50 * len(payload["messages"]), "completion_tokens": 9}}


@pytest.fixture
def command(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.yaml").write_text(TASK)
    (tmp_path / "data").mkdir()
    rows = [{"question": f"What is {i} + 2?", "answer": str(i + 2 + i // 2)} for i in range(3)]
    (tmp_path / "data/sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script.reply = calculated
    return ["eval", "play", script.url, "--model", "m", "--tasks",
            "sums.yaml", "--data-dir", "data", "--output", "out.json", "--concurrent", "2"]


def test_episodes_are_scored_and_failed_ones_asked_for_again(
    command: list[str], script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    script.reply = lambda payload: None if "What is 1 + 2?" in json.dumps(payload) else calculated(payload)
    assert main([*command, "--mode", "thinking"]) == 0
    results = read_results(Path("out.json"))
    assert (results.model.kind, results.model.step) == ("endpoint", None)
    scores = results.tasks["sums"]
    assert (scores.items, scores.failed, scores.mode) == (3, 1, "thinking")
    assert scores.metrics[0].value == 0.5  # the third answer is none
    items = list(read_items(Path("out.json"), results))
    assert [len(item.samples) for item in items] == [2, 2, 2]
    assert items[0].samples[0].response.endswith("<think>It says so.</think>2")
    assert "HTTP 500" in str(capsys.readouterr()) + str(items[1].failed)
    assert all(payload["chat_template_kwargs"] == {"enable_thinking": True} for payload in script.payloads)
    assert len({payload["seed"] for payload in script.payloads}) == 2 * 3 * 2 - 2  # of each turn its own

    before, script.reply = len(script.asked), calculated
    assert main([*command, "--mode", "thinking"]) == 0
    assert len(script.asked) - before == 2 * 2  # what was answered is kept
    assert read_results(Path("out.json")).tasks["sums"].failed == 0


def test_a_wish_to_stop_keeps_what_was_played(
    command: list[str], script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    num_asked = 0

    def stops(payload: dict[str, Any]) -> dict[str, Any]:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return calculated(payload)

    script.reply = stops
    handler = signal.getsignal(signal.SIGTERM)
    assert main(command) == 75
    assert signal.getsignal(signal.SIGTERM) == handler
    assert "of 6 episodes have ended, and all turns are kept; run the same" in capsys.readouterr().err
    assert not Path("out.json").exists()
    assert len(script.asked) <= 7
    Path("out.cache/endpoint.sqlite").unlink()  # the journal alone knows
    assert main(command) == 0
    assert len(script.asked) == 12  # each turn once
    assert read_results(Path("out.json")).tasks["sums"].failed == 0


@pytest.mark.parametrize(("words", "said"), [
    (["--model", ""], "--model: is missing"),
    (["--nproc", "2"], "--nproc 2: an endpoint runs its model itself"),
    (["--engine", "vllm"], "--engine vllm: an endpoint runs its model itself"),
    (["--concurrent", "0"], "--concurrent 0"),
])
def test_mistakes_with_an_endpoint_are_one_sentence(
    command: list[str], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *words]) == 2
    assert said in capsys.readouterr().err
    assert not Path("out.json").exists()


def test_options_of_endpoints_and_an_unsafe_address_are_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command[2] = str(tmp_path)
    assert main(command) == 2
    assert "--model m: for an endpoint" in capsys.readouterr().err
    command[2] = "http://me:secret@localhost:1/v1"
    assert main(command) == 2
    assert "secret" not in capsys.readouterr().err
