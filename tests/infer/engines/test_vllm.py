"""vLLM as an engine: what it is asked, and a clear word where it is not installed.  A stand-in
answers in its place."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from megatron_sov.base.errors import UserError
from megatron_sov.infer.engine import VLLM, Engine, run_engine
from megatron_sov.infer.engines import libraries
from megatron_sov.infer.engines.libraries import VllmEngine
from megatron_sov.infer.engines.target import Target
from megatron_sov.infer.request import Batching, Sampling, StopRule


class StandIn(types.ModuleType):
    """The part of vLLM's interface that is used (0.33.0); each answer counts up from the prompt's last
    token, and a token t has the log-probability -t / 10."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.__spec__ = importlib.machinery.ModuleSpec("vllm", None)

    class SamplingParams(types.SimpleNamespace):
        pass

    class LLM:
        def __init__(self, **settings: Any) -> None:
            self.settings, self.asked, self.calls = settings, [], []

        def __getattr__(self, name: str) -> Any:
            """Note the calls of a weight transfer."""
            if "weight" not in name and name != "reset_prefix_cache":
                raise AttributeError(name)
            return lambda *asked: self.calls.append((name, *asked)) or True

        def generate(self, prompts: list[dict[str, list[int]]], params: list[Any],
                     use_tqdm: bool) -> list[Any]:
            self.asked = params
            return [types.SimpleNamespace(outputs=[self.output(p["prompt_token_ids"][-1] + 1, asked)])
                    for p, asked in zip(prompts, params, strict=True)]

        def output(self, first: int, asked: Any) -> Any:
            tokens = range(first, first + asked.max_tokens)
            ends = [t for t in tokens if t in asked.stop_token_ids]
            tokens = range(first, ends[0] + 1) if ends else tokens
            places = [{t: types.SimpleNamespace(logprob=-t / 10, rank=1)} for t in tokens]
            assert asked.logprobs == 0, "no others than the chosen one"
            return types.SimpleNamespace(token_ids=tuple(tokens), logprobs=places, finish_reason=self.reason
                                         or ("stop" if ends else "length"), routed_experts=self.routes)

        reason = ""
        routes: Any = None


def test_what_is_asked_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", StandIn())
    engine = VllmEngine(Path("folder"), 30, Batching(4, 2))
    settings = engine._llm.settings
    assert settings["max_model_len"] == 30 and settings["max_num_seqs"] == 4
    assert settings["max_num_batched_tokens"] == 4 and settings["generation_config"] == "vllm"
    assert settings["trust_remote_code"] is False and settings["logprobs_mode"] == "processed_logprobs"
    stop = StopRule((8,), ("EE",), lambda tokens: "".join(chr(60 + t) + "E" * (t == 3) for t in tokens))
    found = engine.generate([[1], [6, 7], [4]], Sampling(5, temperature=0.5, top_p=0.9, seed=2), stop=stop)
    assert found.continuations == [[2, 3, 4, 5, 6], [8], [5, 6, 7, 8]]
    assert found.logprobs == [[-t / 10 for t in tokens] for tokens in found.continuations]
    assert (found.finish_reasons, found.temperature, found.version) == (["length", "stop", "stop"], 0.5, 0)
    cut = engine.generate([[1]], Sampling(5), stop=StopRule((), ("E",), lambda tokens: "E" * (3 in tokens)))
    assert (cut.continuations, cut.logprobs, cut.finish_reasons) == ([[2, 3]], [[-0.2, -0.3]], ["stop"])
    engine.generate([[1], [6, 7], [4]], Sampling(5, temperature=0.5, top_p=0.9, seed=2), stop=stop)
    (first, second, _) = engine._llm.asked
    assert ((first.temperature, first.top_p, first.top_k, first.stop_token_ids, first.ignore_eos)
            == (0.5, 0.9, -1, [8], True))
    assert first.seed != second.seed
    engine.generate([[1]], Sampling(5, seed=2), streams=[1])
    assert engine._llm.asked[0].seed == second.seed, "a stream has the same seed in any place"
    with pytest.raises(ValueError, match="num_drafts = 1: the engine vllm does not draft"):
        engine.generate([[1]], Sampling(5, num_drafts=1))


def test_a_continuation_that_vllm_gave_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", StandIn())
    monkeypatch.setattr(StandIn.LLM, "reason", "abort")
    with pytest.raises(UserError, match="vLLM ended a continuation of 5 tokens with 'abort'"):
        VllmEngine(Path("folder"), 30).generate([[1]], Sampling(5))


def test_an_update_is_the_four_calls_of_its_weight_transfer(monkeypatch: pytest.MonkeyPatch,
                                                            hf_models: dict[str, Path]) -> None:
    """A GPU's memory is not there: a tensor's own number stands for its place in it."""
    folder = hf_models["solar_open"]
    monkeypatch.setitem(sys.modules, "vllm", StandIn())
    monkeypatch.setattr(libraries, "_place_in_memory", lambda tensor: {"GPU-1": (float(tensor.sum()),)})
    monkeypatch.setattr(libraries, "MESSAGE_BYTES", 100_000)
    monkeypatch.delenv(libraries.PICKLES, raising=False)
    with pytest.raises(UserError, match="VLLM_ALLOW_INSECURE_SERIALIZATION is None"):
        VllmEngine(folder, 30, for_updates=True)
    monkeypatch.setenv(libraries.PICKLES, "1")
    engine = VllmEngine(folder, 30, for_updates=True)
    assert engine._llm.settings["weight_transfer_config"] == {"backend": "ipc"}
    weights = load_file(folder / "model.safetensors")
    engine.update(iter(weights.items()), 5)
    names = [name for name, *_ in engine._llm.calls]
    assert names[:2] == ["init_weight_transfer_engine", "start_weight_update"] and len(names) > 6
    assert set(names[2:-2]) == {"update_weights"}
    assert engine._llm.calls[-2:] == [("finish_weight_update", "5"), ("reset_prefix_cache",)]
    told = [call[1]["update_info"] for call in engine._llm.calls if call[0] == "update_weights"]
    assert [name for message in told for name in message["names"]] == list(weights)
    assert [shape for m in told for shape in m["shapes"]] == [list(t.shape) for t in weights.values()]
    assert {d for m in told for d in m["dtype_names"]} == {"float32"}
    assert [h for m in told for h in m["ipc_handles"]] == [{"GPU-1": (float(t.sum()),)}
                                                           for t in weights.values()]
    assert engine.generate([[1]], Sampling(2)).version == 5
    with pytest.raises(UserError, match="1 missing"):
        engine.update(iter(list(weights.items())[1:]), 6)
    with pytest.raises(UserError, match="the engine vllm holds parts of two models: its update to version 6"):
        engine.generate([[1]], Sampling(2))


def test_work_reaches_it_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", StandIn())

    def work(engine: Engine) -> Any:
        assert isinstance(engine, VllmEngine) and engine._llm.settings["max_model_len"] == 9
        return engine.generate([[1], [6]], Sampling(2)).continuations

    assert run_engine(VLLM, Target(Path("folder"), True), work, longest=9) == [[2, 3], [7, 8]]


def test_it_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"is not installed for this Python; .*\[rollout\]' -c "):
        VllmEngine(Path("folder"), 30)


def test_routes_are_those_of_the_layers_with_experts_up_to_what_was_kept(
        monkeypatch: pytest.MonkeyPatch, hf_models: dict[str, Path]) -> None:
    """The model has a dense layer, four with experts and eight experts, of which a token visits two."""
    monkeypatch.setitem(sys.modules, "vllm", StandIn())
    engine = VllmEngine(hf_models["exaone_moe"], 30, with_routes=True)
    assert engine._llm.settings["enable_return_routed_experts"] is True
    asked, stop = Sampling(5, with_routes=True), StopRule((), ("E",), lambda tokens: "E" * (3 in tokens))
    told = np.zeros((6, 5, 2), np.int16)  # a prompt of two tokens and five more but the last
    told[:, 1:] = [[1, 2], [3, 4], [5, 6], [7, 0]]
    for layers in (told, told[:, 1:]):
        monkeypatch.setattr(StandIn.LLM, "routes", layers)
        found = engine.generate([[9, 1]], asked, stop=stop)
        assert found.continuations == [[2, 3]] and found.routes is not None
        (routes,) = found.routes
        assert routes.dtype == np.uint8 and routes.tolist() == told[:3, 1:].tolist()
        assert engine.generate([[9, 1]], Sampling(5)).routes is None
    wide = told.copy()
    wide[2, 3, 1] = 264  # 8 in one byte
    for wrong, said in ((None, "tells nothing"), (told[:2], r"tells shape \[2, 5, 2\]"),
                        (wide, "tells experts from 0 to 264, of 8"),
                        (np.zeros_like(told), r"to \[0, 0\]; a token visits an expert of a layer once")):
        monkeypatch.setattr(StandIn.LLM, "routes", wrong)
        with pytest.raises(UserError, match=rf"(?s)routes of 6 tokens, 4 layers and 2 experts.*{said}"):
            engine.generate([[9, 1]], asked)
    with pytest.raises(ValueError, match="was started without routes"):
        VllmEngine(hf_models["exaone_moe"], 30).generate([[1]], asked)
