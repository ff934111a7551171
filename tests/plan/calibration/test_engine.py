"""Measuring an engine, against a server whose steps are known and whose clock is the test's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.plan.calibration import engine
from megatron_sov.plan.calibration.engine import FEW_TOKENS, MANY_TOKENS, PROMPT_TOKENS, fit, measure
from megatron_sov.plan.calibration.expected import read_learned
from megatron_sov.plan.post_training import EngineCosts, Engines, step_s
from megatron_sov.plan.speed.parameters import default
from megatron_sov.plan.speed.workload import of_model
from megatron_sov.work.clusters.chips import chip, default_links
from tests.token_servers import VllmDouble

H100 = chip("h100")
MODEL = "qwen3-4b"
TRUTH = EngineCosts(step_s=2e-3, layer_s=29e-6, response_s=30e-6, message_s=20e-6)
"""Half of the published rounds' host, and a dearer sampler."""


def engines(tp: int = 1) -> Engines:
    return Engines(of_model(recipes.get(MODEL).model), H100, default_links(H100), 8, tp, costs=TRUTH)


class TimedServer:
    """Answers as vLLM does; its clock goes on by what its steps take."""

    def __init__(self, of: Engines, answer: Mapping[str, Any] | None = None) -> None:
        self.of, self.now_s, self.asked = of, 0.0, list[Mapping[str, Any]]()
        self._answer = answer

    def look(self, path: str) -> Any:
        assert path == "/v1/models"
        return {"data": [{"id": "policy", "max_model_len": 4096}]}

    def ask(self, path: str, payload: Mapping[str, Any]) -> Any:
        assert path == "/v1/completions"
        self.asked.append(payload)
        running, tokens = payload["n"], payload["max_tokens"]
        slow = 1.5 if len(self.asked) % 3 == 0 else 1.0  # one of three repeats meets something else
        self.now_s += slow * (0.3 + sum(step_s(self.of, running, PROMPT_TOKENS + i, default())
                                        for i in range(tokens)))
        return self._answer or {"choices": [{"text": "x"}] * running,
                                "usage": {"completion_tokens": running * tokens}}

    def clock(self) -> float:
        return self.now_s


@pytest.mark.parametrize("tp", [1, 2])
def test_a_server_is_priced_as_it_was_measured(tp: int) -> None:
    server = TimedServer(engines(tp))
    found = fit(engines(tp), measure(server, "policy", server.clock), default())
    assert found.response_s == pytest.approx(TRUTH.response_s, rel=0.01)
    for running in (1, 32, 512):
        at = [step_s(replace(engines(tp), costs=costs), running, 500, default()) for costs in (found, TRUTH)]
        assert at[0] == pytest.approx(at[1], rel=0.01)
    # another model of other depth is priced in proportion
    deep = replace(engines(tp), shape=of_model(recipes.get("qwen3-8b").model))
    at = [step_s(replace(deep, costs=costs), 32, 500, default()) for costs in (found, TRUTH)]
    assert at[0] == pytest.approx(at[1], rel=0.01)


def test_no_prompt_is_asked_twice_with_one_length_and_number() -> None:
    server = TimedServer(engines())
    measure(server, "policy", server.clock)
    prompts = [tuple(one["prompt"]) for one in server.asked[1:]]
    assert len(set(prompts)) == len(prompts) == 3 * 2 * len(engine.RUNNING)
    assert {one["max_tokens"] for one in server.asked} == {FEW_TOKENS, MANY_TOKENS}


def test_costs_are_never_negative() -> None:
    quick = replace(engines(), costs=EngineCosts(step_s=0, layer_s=0, response_s=0, message_s=0))
    server = TimedServer(replace(quick, chip=replace(H100, hbm_bytes_per_s=1.1 * H100.hbm_bytes_per_s)))
    found = fit(engines(), measure(server, "policy", server.clock), default())
    assert found.step_s == found.layer_s == 0 and 0 <= found.response_s < 2e-6


def test_another_chip_or_model_than_was_named_is_refused() -> None:
    server = TimedServer(replace(engines(), shape=of_model(recipes.get("tiny-qwen3").model)))
    with pytest.raises(UserError, match="name the recipe of the model that is served"):
        fit(replace(engines(), shape=of_model(recipes.get("qwen3-8b").model)),
            measure(server, "policy", server.clock), default())


@pytest.mark.parametrize(("answer", "sentence"), [
    ({"choices": [{"text": "x"}], "usage": {"completion_tokens": 3}}, "3 tokens together"),
    ("done", "no object of JSON")])
def test_a_server_that_does_something_else_is_told(answer: Any, sentence: str) -> None:
    server = TimedServer(engines(), answer)
    with pytest.raises(UserError, match=sentence):
        measure(server, "policy", server.clock)


@pytest.mark.parametrize(("is_dead", "sentence"), [
    (False, "/v1/completions answered HTTP 404: Not Found\n"),
    (True, "/v1/models answered HTTP 500: EngineCore encountered an issue.; pass the address of a server")])
def test_what_a_server_refuses_is_told(is_dead: bool, sentence: str,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    double = VllmDouble()
    double.refuses, double.is_dead = "/v1/completions".__eq__, is_dead
    command = ["plan", MODEL, "--cluster", "h100", "--calibrate-engine", f"{double.url}/v1"]
    assert main(command) == 2
    assert f"{double.url}{sentence}" in capsys.readouterr().err
    double.close()


def test_a_plan_says_whose_engine_it_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    server, out = TimedServer(engines()), tmp_path / "engine.json"
    monkeypatch.setattr(engine, "ServerCalls", lambda *given: server)
    monkeypatch.setattr(measure, "__defaults__", (server.clock, print))
    command = ["plan", MODEL, "--cluster", "h100"]
    assert main([*command, "--calibrate-engine", "http://localhost:8000/v1", "--output", str(out)]) == 0
    assert f"wrote {out}; pass it as --parameters" in capsys.readouterr().out
    learned = read_learned(out)
    assert learned.engine["response_s"] == pytest.approx(TRUTH.response_s, rel=0.01)

    rl = ["plan", "typhoon-s-4b-legal", "--cluster", "h100", "--json"]
    plans = []
    for more in ([], ["--parameters", str(out)]):
        assert main([*rl, *more]) == 0
        plans.append(json.loads(capsys.readouterr().out)["stages"][0])
    assert [("NeMo RL's with vLLM" in str(plan), "an engine of yours" in str(plan)) for plan in plans] == [
        (True, False), (False, True)]
    assert plans[1]["hours"] < plans[0]["hours"]


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--calibrate-engine", "http://localhost:1/v1"], "name the cluster"),
    (["--cluster", "h100", "--calibrate-engine", "localhost:1"], "must be an address such as"),
    (["--cluster", "h100", "--calibrate-engine", "http://127.0.0.1:1/v1"], "pass the address of a server"),
    (["--cluster", "h100", "--calibrate-engine", "http://localhost:1/v1", "--json"],
     "--json belongs to a plan"),
    (["--cluster", "h100", "--engine-gpus", "2"], "--engine-gpus 2: is of the server")])
def test_what_cannot_be_measured_is_a_sentence(arguments: list[str], sentence: str,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", MODEL, *arguments]) == 2
    assert sentence in capsys.readouterr().err
