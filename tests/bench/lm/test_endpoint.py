"""An OpenAI-compatible endpoint: what it is asked, what its answers mean, and what it cannot tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.bench.lm import answers
from megatron_sov.bench.lm.results import read_items, read_results
from megatron_sov.cli import main
from megatron_sov.work.endpoints.cache import EndpointCache


def reply(payload: dict[str, Any]) -> dict[str, Any] | None:
    """Answer with the last number of the prompt."""
    if "fail" in json.dumps(payload):
        return None
    if payload.get("echo"):
        logprobs = [None, *(-token / 1000 for token in payload["prompt"][1:]), -9.0]
        top = [None, *({"a": -0.2} for _ in payload["prompt"][1:]), {}]
        told = {"token_logprobs": logprobs, "top_logprobs": top}
        return {"choices": [{"text": "", "logprobs": told, "finish_reason": "length"}]}
    said = {"text": "3 the rest\nmore"} if "messages" not in payload else {"message": {"content": "3"}}
    return {"choices": [{**said, "finish_reason": "stop"}]}


@pytest.fixture
def command(tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("MY_KEY", "secret")
    script.reply = reply
    rows = [{"q": f"{i} + 1 = {'fail' if i == 3 else ''}", "a": str(i + 1)} for i in range(4)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs: {data_files: {test: d.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {until: [' the'], max_gen_toks: 7}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n")
    (tmp_path / "likely.yaml").write_text(
        "task: likely\ndataset_path: json\ndataset_kwargs: {data_files: {test: d.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_text: 'sum'\ndoc_to_target: ' {{a}}'\nmetric_list:\n"
        "- {metric: acc, aggregation: mean, higher_is_better: true}\n")
    return ["eval", "lm", script.url, "--model", "m", "--key-env",
            "MY_KEY", "--task-dir", str(tmp_path), "--output", str(tmp_path / "out.json")]


def test_texts_are_asked_for_and_what_is_not_answered_is_named(command: list[str], script: Any,
                                                               tmp_path: Path, capsys) -> None:
    assert main([*command, "--tasks", "sums"]) == 0
    path, payload, key = script.asked[0]
    assert (path, key) == ("/v1/completions", "Bearer secret")
    assert payload.items() >= {"model": "m", "max_tokens": 7, "temperature": 0.0, "stop": [" the"]}.items()
    found = read_results(tmp_path / "out.json")
    assert (found.model.kind, found.tasks["sums"].items, found.tasks["sums"].failed) == ("endpoint", 4, 1)
    assert found.tasks["sums"].metrics[0].value == 1 / 3
    items = list(read_items(tmp_path / "out.json", found))
    assert [i.samples[0].response for i in items[:3]] == ["3"] * 3
    assert "HTTP 500" in str(items[3].failed)
    said = capsys.readouterr()
    assert "sums: 1 of 4 items have no score; of the first: the endpoint answered HTTP 500" in said.err
    assert "secret" not in said.out + said.err + (tmp_path / "out.json").read_text()

    # what was answered is kept, what failed is asked for again
    before = len(script.asked)
    assert main([*command, "--tasks", "sums"]) == 0
    assert {json.dumps(p)[:200].count("fail") for _, p, _ in script.asked[before:]} == {1}


@pytest.mark.deep
def test_another_model_under_the_same_name_is_refused_until_the_user_decides(
        command: list[str], script: Any, tmp_path: Path, capsys) -> None:
    sums = [*command, "--tasks", "sums", "--limit", "3"]
    assert main(sums) == 0
    assert read_results(tmp_path / "out.json").tasks["sums"].metrics[0].value == 1 / 3
    script.name = "two"
    script.reply = lambda payload: {"choices": [{"text": "no", "finish_reason": "stop"}]}
    before = len(script.asked)
    [file] = (tmp_path / "out.cache").rglob("endpoint.sqlite")
    kept = EndpointCache(file).keys()
    assert main(sums) == 2
    said = capsys.readouterr().err
    assert "answers 4 of 4 fixed questions otherwise than the model 'm'" in said
    assert "name another --cache" in said
    assert len(script.asked) == before and EndpointCache(file).keys() == kept and kept
    assert main([*sums, "--cache", str(tmp_path / "new")]) == 0
    assert read_results(tmp_path / "out.json").tasks["sums"].metrics[0].value == 0
    before = len(script.asked)
    assert main([*sums, "--same-model"]) == 0 and main(sums) == 0
    assert read_results(tmp_path / "out.json").tasks["sums"].metrics[0].value == 1 / 3
    assert len(script.asked) == before


def test_likelihoods_are_those_of_the_echoed_tokens(command: list[str], script: Any, tmp_path: Path,
                                                    token_shards: Path, capsys) -> None:
    from megatron_sov.infer.engines.load import load_tokenizer

    folder = token_shards / "tokenizer"
    likely = [*command, "--tasks", "likely", "--tokenizer", str(folder), "--max-length", "64"]
    assert main(likely) == 0
    tokens = load_tokenizer(folder).encode("sum 1")
    asked = [payload["prompt"] for _, payload, _ in script.asked]
    assert tokens in asked
    found = read_results(tmp_path / "out.json")
    answer_tokens = tokens[len(load_tokenizer(folder).encode("sum")):]
    items = list(read_items(tmp_path / "out.json", found))
    # the server's best token has -0.2, so tokens below 200 are the most probable ones
    assert items[0].scores["acc"] == float(all(token <= 200 for token in answer_tokens))

    script.reply = lambda payload: {"choices": [{"text": "", "logprobs": None, "finish_reason": "length"}]}
    assert main([*likely, "--cache", str(tmp_path / "other")]) == 2
    assert "tells no likelihoods of what it is given" in capsys.readouterr().err


def test_a_wrong_key_ends_the_command(command: list[str], script: Any, monkeypatch, capsys) -> None:
    monkeypatch.setattr(script.RequestHandlerClass, "do_POST", lambda self: self.send_error(401))
    assert main([*command, "--tasks", "sums"]) == 2
    assert "the key is not accepted (HTTP 401)" in capsys.readouterr().err


@pytest.mark.parametrize("values", [[None, float("nan")], [None, True], [None, "-1"]])
def test_a_likelihood_that_is_no_number_is_none(values: list[Any]) -> None:
    raw = {"choices": [{"logprobs": {"token_logprobs": values}}]}
    with pytest.raises(answers.BadAnswer, match="told no likelihood"):
        answers._likelihood(raw, 1, 2)


@pytest.mark.parametrize("top", [{"a": "x"}, {"a": None}, [], None])
def test_top_likelihoods_of_a_stranger_are_not_believed(top: Any) -> None:
    raw = {"choices": [{"logprobs": {"token_logprobs": [None, -1.0], "top_logprobs": [None, top]}}]}
    assert answers._likelihood(raw, 1, 2) == {"logprob": -1.0, "greedy": False}
