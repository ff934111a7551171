"""`megatron-sov eval passk`: figures of given responses, and of responses that a model generates."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.artifacts import find_damaged_files, read_manifest
from megatron_sov.base.errors import ExitCode
from megatron_sov.cli import main
from megatron_sov.commands.evaluate import eval_passk_run as eval_passk
from megatron_sov.eval.pass_at_k import format_table
from megatron_sov.infer.engines.transformers_engine import HfEngine
from megatron_sov.publish.report.run_data import Run
from megatron_sov.publish.report.sections import SECTIONS
from megatron_sov.runs.obs.events import EVENTS, EventLog, read_events

ANSWERS = {"2+2?": ["The answer is 4", "The answer is 4", "The answer is 5", "The answer is 5"],
           "3+3?": ["The answer is 7", "The answer is 6", "The answer is 7", "The answer is 8"]}
GOLD = {"2+2?": "4", "3+3?": "6"}
JUDGE = ["--reward", "stem", "--workers", "1", "--json"]


@pytest.fixture(autouse=True)
def folder(cwd: Path) -> Path:
    """An empty folder to work in."""
    return cwd


def write_rows(name: str, rows: list[dict]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_passk(read_output: Any, *arguments: str) -> dict:
    return json.loads(read_output("eval", "passk", *JUDGE, *arguments))


def judge_rows(rows: list[dict], read_output: Any, monkeypatch: pytest.MonkeyPatch,
               model: Path, *more: str) -> dict:
    """Return the figures of rows in place of a model's responses."""
    write_rows("prompts.jsonl", [{"prompt": "x"}])
    write_rows("sampled.jsonl", rows)
    monkeypatch.setattr(eval_passk, "_sample", lambda plan: Path("sampled.jsonl"))
    return run_passk(read_output, str(model), "--input", "prompts.jsonl", "--output", "out", *more)


def test_responses_are_judged_and_counted(hf_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
                                          read_output: Any) -> None:
    EventLog(Path(EVENTS)).close()
    rows = []
    for i, (prompt, responses) in enumerate(ANSWERS.items()):
        rows += [{"prompt": prompt, "prompt_index": i, "answer": GOLD[prompt], "response": response,
                  "finish_reason": "stop"} for response in responses]
    result = judge_rows(rows, read_output, monkeypatch, hf_models["solar_open"], "--run", ".")
    assert (result["num_prompts"], result["num_samples"], result["num_right"]) == (2, 8, 3)
    assert result["mean_reward"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert result["share_at_limit"] == 0.0
    # 5 of the 6 pairs of answers to the first prompt have a right answer, and 3 of 6 for the second
    assert [(e["k"], e["value"]) for e in result["pass_at_k"]] == [
        (1, pytest.approx(0.375)), (2, pytest.approx((5 / 6 + 3 / 6) / 2)), (4, 1.0)]
    assert all(e["interval"][0] <= e["value"] <= e["interval"][1] for e in result["pass_at_k"])
    # majority of four: 4 and 5 tie with two votes each (1/2), and the right 6 loses against 7 (0)
    assert result["maj_at_k"][-1]["value"] == pytest.approx(0.25)
    manifest = read_manifest("out", "passk")
    assert find_damaged_files("out") == [] and set(manifest.files) == {"results.json", "samples.jsonl"}
    assert manifest.content == result
    rows = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == [1, 1, 0, 0, 0, 1, 0, 0]
    (event,) = read_events(Path(EVENTS))
    section = SECTIONS["pass@k"].build(Run("r", {}, events={"passk": [event]}))
    assert (event["event"], event["pass_at_k"]) == ("passk", result["pass_at_k"])
    assert "prompts.jsonl, stem" in section.charts[0].caption


def test_a_response_without_a_reward_is_not_counted_as_wrong(hf_models: dict[str, Path],
                                                             monkeypatch: pytest.MonkeyPatch,
                                                             read_output: Any) -> None:
    rows = [{"prompt_index": 1, "answer": "4", "response": "The answer is 4"},
            {"prompt_index": 1, "response": "4"}]
    result = judge_rows(rows, read_output, monkeypatch, hf_models["solar_open"])
    assert result["statuses"] == {"scored": 1, "refused": 1}
    assert [e["value"] for e in result["pass_at_k"]] == [1.0]
    assert "1 refused, 1 scored responses" in format_table(result)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--k", "9"], "--k 9: is more than --samples 8"),
    (["--temperature", "0"], "are equal responses"),
    (["--input", "empty.jsonl"], "line 1: has no 'prompt'"),
    (["--input", "half.jsonl"], "has '\\ud800' at character 3, an unpaired surrogate"),
    (["--reward", "stemm"], "did you mean 'stem'?"),
])
def test_mistakes_are_one_sentence(arguments: list[str], message: str, get_refusal: Any) -> None:
    write_rows("prompts.jsonl", [{"prompt": "x"}])
    write_rows("empty.jsonl", [{"answer": "1"}])
    write_rows("half.jsonl", [{"prompt": "a \ud800", "answer": "1"}])
    Path("model").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("model", name).touch()
    command = ["eval", "passk", *JUDGE, "model", "--input", "prompts.jsonl", "--output", "out"]
    assert message in get_refusal(*command, *arguments)
    assert not Path("out").exists()


PROMPTS = [{"prompt": f"{word} ", "answer": "x"} for word in ("The", "def", "import", "return", "class")]
SAMPLING_OPTIONS = ["--input", "prompts.jsonl", "--samples", "4", "--max-new-tokens", "3", "--seed", "3"]


def read_responses(folder: str) -> list[dict]:
    rows = [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("prompt", "sample", "response", "num_tokens")} for row in rows]


@pytest.mark.deep
def test_a_killed_command_resumes(hf_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
                                  read_output: Any, get_refusal: Any) -> None:
    write_rows("prompts.jsonl", PROMPTS)
    calls: list[int] = []
    generate = HfEngine.generate

    def generate_or_stop(engine: HfEngine, prompts: list, *rest: object, **more: object) -> object:
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(engine, prompts, *rest, **more)

    monkeypatch.setattr(HfEngine, "generate", generate_or_stop)
    command = [str(hf_models["solar_open"]), *SAMPLING_OPTIONS, "--batch-size", "2"]  # two prompts a call
    assert main(["eval", "passk", *JUDGE, *command, "--output", "out"]) == ExitCode.INTERRUPTED
    assert not Path("out").exists()
    assert ("model.sampling.seed was 3, and is 4"
            in get_refusal("eval", "passk", *JUDGE, *command, "--seed", "4", "--output", "out"))
    result = run_passk(read_output, *command, "--output", "out")
    assert calls == [8, 8, 8, 4]  # the interrupted second call is repeated: 5 prompts x 4 samples
    assert (result["num_prompts"], result["num_samples"], result["share_at_limit"]) == (5, 20, 1.0)
    complete = run_passk(read_output, *command, "--output", "whole")
    assert read_responses("out") == read_responses("whole") and complete["pass_at_k"] == result["pass_at_k"]
    assert len({row["response"] for row in read_responses("out")[:4]}) > 1
    assert read_manifest("out").settings["model"]["sampling"]["temperature"] == 1.0
    assert sorted(p.name for p in Path().iterdir()) == ["out", "prompts.jsonl", "whole"]


def test_a_checkpoint_on_two_processes_generates_the_same_as_on_one(
        one_rank: None, imported: dict[str, Path], run_checked: Any, read_output: Any) -> None:
    write_rows("prompts.jsonl", PROMPTS[:2])
    command = [str(imported["solar_open"]), *SAMPLING_OPTIONS]
    run_passk(read_output, *command, "--output", "one")
    run_checked("eval", "passk", *JUDGE, *command, "--output", "two", "--nproc", "2", "--set",
                "parallel.ep=2")
    assert read_responses("one") == read_responses("two")
    assert read_manifest("one").inputs[0]["kind"] == "checkpoint"
