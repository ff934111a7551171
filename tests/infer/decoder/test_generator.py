"""Cached generation equals full forward passes at every layout."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.checkpoint import initial_weights
from megatron_sov.convert import export_weights
from megatron_sov.engine.decode.cached_decoder import CachedDecoder
from megatron_sov.engine.decode.forward_only import DocumentBatch, ForwardModel
from megatron_sov.engine.model.language_model import build_model
from megatron_sov.engine.parallel import collectives, world
from megatron_sov.infer import request
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.infer.engines.load import load_forward_model
from megatron_sov.infer.engines.target import build_inference_config
from megatron_sov.infer.engines.transformers_engine import load_hf
from megatron_sov.infer.request import Batching, GenerationBounds, Sampling, StopRule
from megatron_sov.model.config import ParallelConfig, apply_settings
from tests.tiny import tiny_model

WINDOW, NEW = 8, 8
PROMPTS = [[5, 9, 2, 70], [30], list(range(20, 44)), [7] * 9, [80, 81, 82, 83, 84],
           [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]]
"""Shorter and longer than the window."""
REPEATED = [0, 2, 0, 5, 2, 0, 1, 1, 5, 2]
"""Places of prompts that several sequences have."""
LIMITS = [3, 8, 1, 5, 8, 2]
"""Longest continuation of each."""
ALONE = (1, 2, 5)
"""Places of those that are also written without the others: the shortest, the longest, the last."""
SETTINGS = ["model.vocab_size=96", "model.hidden_size=32", "model.head_dim=8", "model.expert_ffn_dim=16",
            "model.init_std=0.3", f"model.sliding_window_tokens={WINDOW}", "model.num_layers=4",
            "model.num_experts=4", "train.precision=fp64"]


def continuations(layout: dict[str, Any], *, full: bool = False, pieces: bool = False,
                  family: str = "k-exaone", settings: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the continuations of a random model, computed in several ways, on this process."""
    _, model = tiny_model(f"tiny-{family}", *SETTINGS, *settings, layout=layout)
    policy = ForwardModel(model, 50)
    attention = [type(m.core_attention).__name__ for m in model.modules() if hasattr(m, "core_attention")]
    warm = Sampling(NEW, temperature=1.0, top_k=40, top_p=0.9, seed=3)

    def write(prompts: Any, sampling: Any, batching: Any = None, **more: Any) -> Any:
        return MegatronEngine(policy, batching).generate(prompts, sampling, **more).continuations

    routed = Sampling(NEW, with_routes=True)
    plain = MegatronEngine(policy).generate(PROMPTS, routed)
    greedy = plain.continuations
    rows = iter(range(1000))
    # each process is asked, and only the first one says when it is enough
    stop_row = 2 if int(os.environ["RANK"]) == 0 else 0
    over = GenerationBounds(LIMITS, lambda: next(rows) == stop_row)
    found = {"greedy": greedy, "routes": [r.tolist() for r in plain.routes],
             "sampled": write(PROMPTS, warm),
             "stopped early": write(PROMPTS, Sampling(NEW), bounds=over),
             "limited": write(PROMPTS, Sampling(NEW), bounds=GenerationBounds(LIMITS, lambda: False))}
    if full:
        found["end"] = greedy[2][5]
        found["stopped"] = write(PROMPTS, Sampling(NEW), stop=StopRule((found["end"],)))
        found["alone"] = {i: write([PROMPTS[i]], warm, streams=[i])[0] for i in ALONE}
        found |= _repeated(policy, warm, routed)
        row = [DocumentBatch([[*p, *c]], torch.device("cpu")) for p, c in zip(PROMPTS, greedy, strict=True)]
        model.config.routing_step.record = record = {}
        found["full"] = [policy.logits(r, torch.arange(len(p) - 1, len(p) + NEW - 1)).argmax(-1).tolist()
                         for p, r in zip(PROMPTS, row, strict=True)]
        model.config.routing_step.record = None
        found["full routes"] = [torch.stack([record[layer][i] for layer in sorted(record)], 1)[:-1].tolist()
                                for i in range(len(PROMPTS))]
    if pieces:
        found["pieces"] = write(PROMPTS, Sampling(NEW), Batching(2, 3))
        request.CACHE_TOKENS = 1
        found["one slot"] = write(PROMPTS, Sampling(NEW))
    found["as before"] = model.training and attention == [
        type(m.core_attention).__name__ for m in model.modules() if hasattr(m, "core_attention")]
    world.leave_world()
    return found


def _repeated(policy: Any, warm: Any, routed: Any) -> dict[str, Any]:
    """Return continuations of repeated prompts, in rows of several sizes and alone, with routes, and the
    tokens read."""
    prompts, read = [PROMPTS[i] for i in REPEATED], list[int]()
    inner = CachedDecoder.read

    def noted(decoder: Any, spans: Any, row_tokens: int) -> Any:
        read.append(sum(len(s.tokens) for s in spans if s.past < len(prompts[s.slot])))
        return inner(decoder, spans, row_tokens)

    CachedDecoder.read = noted  # type: ignore[method-assign]
    try:
        routes = MegatronEngine(policy).generate(prompts, routed).routes
    finally:
        CachedDecoder.read = inner  # type: ignore[method-assign]
    samples = [MegatronEngine(policy, batching).generate(prompts, warm).continuations
               for batching in (None, Batching(4, 7), Batching(10, 5), Batching(3, 1000))]
    return {"repeated": samples, "repeated routes": [r.tolist() for r in routes or ()],
            "prompts read": sum(read),
            "one by one": [MegatronEngine(policy).generate([prompt], warm, streams=[i]).continuations[0]
                           for i, prompt in enumerate(prompts)]}


LAYOUTS = {
    "PP2 VPP2": (2, {"pp": 2, "vpp": 2}),
    "EP2, experts by gathering": (2, {"ep": 2, "expert_dispatcher": "allgather"}),
    "TP2+SP x CP2, EP4": (4, {"tp": 2, "sp": True, "cp": 2, "ep": 4}),
}


def check_ways(found: dict[str, Any]) -> None:
    """Compare all continuations of a process with its greedy continuations."""
    greedy = found["greedy"]
    assert greedy == found["full"], "cached differs from a full forward pass"
    assert found["routes"] == found["full routes"] and greedy != found["sampled"]
    assert found["alone"] == {str(i): found["sampled"][i] for i in ALONE}, (
        "a prompt's samples depend on the others of its batch")
    assert found["repeated"] == [found["one by one"]] * 4, "a prompt that is read once is another one"
    assert found["repeated routes"] == [found["routes"][i] for i in REPEATED]
    once = sum(len(PROMPTS[i]) for i in set(REPEATED))
    assert found["prompts read"] == once + len(REPEATED) - len(set(REPEATED)), "the last token is read"
    assert len({tuple(c) for c in greedy}) == len(PROMPTS) and {len(c) for c in greedy} == {NEW}
    end = found["end"]
    assert found["stopped"] == [c[:c.index(end) + 1] if end in c else c for c in greedy]
    assert found["as before"]
    assert found["limited"] == [c[:most] for c, most in zip(greedy, LIMITS, strict=True)]
    # the prompts in one row, and a token in each of two more
    assert found["stopped early"] == [c[:min(most, 3)] for c, most in zip(greedy, LIMITS, strict=True)]


@pytest.mark.distributed
@pytest.mark.deep
@pytest.mark.parametrize("names", [["TP2+SP x CP2, EP4"], ["PP2 VPP2", "EP2, experts by gathering"]],
                         ids=["all kinds", "gathering"])
def test_generation_is_equal_at_every_layout(ranks, job, names: list[str]) -> None:
    alone, *others = ranks(
        job(__file__, "continuations", 1, {"layout": {}, "full": True, "pieces": True}),
        *(job(__file__, "continuations", n, {"layout": x}) for n, x in map(LAYOUTS.get, names)))
    check_ways(alone[0])
    assert alone[0]["pieces"] == alone[0]["one slot"] == alone[0]["greedy"]
    for name, per_rank in zip(names, others, strict=True):
        for rank, found in enumerate(per_rank):
            for way in ("greedy", "routes", "sampled", "limited", "as before"):
                assert found[way] == alone[0][way], (name, rank, way)
            assert found["stopped early"] == per_rank[0]["stopped early"]
            assert all(0 < len(c) <= 3 for c in found["stopped early"]), "it was not the first that said so"


FAMILIES = {"k-exaone": SETTINGS[:-1], "solar-open": [*SETTINGS[:-1], "model.sliding_window_tokens=0"],
            "qwen3": SETTINGS[:3]}


def logprobs_of(layout: dict[str, Any], family: str, chosen: list[str]) -> dict[str, Any]:
    """Return the distance of the engine's log-probabilities from the trainer's (fp32) for each sampling
    setting, and the continuations of another model before and after an update."""
    parallel = ParallelConfig(**layout)
    config = apply_settings(recipes.get(f"tiny-{family}"), [*FAMILIES[family], "train.precision=fp32"])
    world.join_world(parallel)
    model = build_model(config.model, parallel, config.train)
    initial_weights.initialize_weights(model, config.model, 1)
    policy = ForwardModel(model, 7)

    def trainers(row: list[int], temperature: float) -> torch.Tensor:
        """Return the log-probability of each token of a row except the first."""
        batch = DocumentBatch([row], torch.device("cpu"))
        if temperature not in (0, 1):
            logits = policy.logits(batch, torch.arange(len(row) - 1)).double() / temperature
            return logits.log_softmax(-1)[torch.arange(len(row) - 1), torch.tensor(row[1:])]
        labels = batch.inputs.tokens.roll(-1)
        found = policy.map([batch], lambda hidden, head, _: head.logprobs(hidden[0], labels))
        whole = collectives.broadcast_from_last_stage(found[0] if found else torch.zeros(len(labels)))
        return whole[:len(row) - 1]

    def furthest(sampling: Sampling) -> dict[str, Any]:
        asked = dataclasses.replace(sampling, with_routes=not layout)
        found = MegatronEngine(policy, Batching(3, 5)).generate(FEW, asked, stop=StopRule((50,)))
        record = model.config.routing_step.record = {} if asked.with_routes else None
        gaps = [(trainers([*p, *c], sampling.temperature)[len(p) - 1:] - torch.tensor(told)).abs().max()
                for p, c, told in zip(FEW, found.continuations, found.logprobs, strict=True)]
        model.config.routing_step.record = None
        for i, routes in enumerate(found.routes or ()):
            read = torch.stack([record[layer][i] for layer in sorted(record)], 1)[:-1]
            assert torch.equal(read, torch.from_numpy(routes).long()), "the trainer routes otherwise"
        return {"gap": float(max(gaps)), "tokens": found.continuations, "reasons": found.finish_reasons,
                "lowest": min(map(min, found.logprobs))}

    ways = {"greedy": Sampling(NEW), "T 1": Sampling(NEW, 1.0, seed=3), "T 0.7": Sampling(NEW, 0.7, seed=3)}
    found = {name: furthest(ways[name]) for name in chosen}
    other = build_model(config.model, parallel, config.train)
    initial_weights.initialize_weights(other, config.model, 2)
    engine = MegatronEngine(ForwardModel(other, 7))
    versions = []
    for weights, version in ((None, 1), (export_weights(model, everywhere=True), 7)):
        engine.update(weights, version)
        written = engine.generate(FEW, ways["T 1"], stop=StopRule((50,)))
        versions.append((written.version, written.continuations == found["T 1"]["tokens"]))
    found["updated"] = versions
    world.leave_world()
    return found


FEW = PROMPTS[1:5]
"""One more than are written at a time."""
WHERE = [("k-exaone", 1, {}, ["greedy", "T 1", "T 0.7"]),
         ("qwen3", 2, {"tp": 2, "sp": True}, ["T 1", "T 0.7"]),
         ("k-exaone", 2, {"pp": 2}, ["T 1", "T 0.7"]),
         ("solar-open", 2, {"ep": 2}, ["T 1", "T 0.7"])]
"""Family, processes, layout, ways to sample."""


@pytest.mark.distributed
@pytest.mark.essential
@pytest.mark.parametrize("further", [[1], pytest.param([2, 3], marks=pytest.mark.deep)],
                         ids=["tensors", "stages and experts"])
def test_logprobs_equal_those_of_the_trainer(ranks, job, further: list[int]) -> None:
    """At the first layout of WHERE, and further layouts."""
    chosen = [WHERE[i] for i in (0, *further)]
    alone, *others = ranks(*(
        job(__file__, "logprobs_of", n, {"layout": layout, "family": family, "chosen": ways})
        for family, n, layout, ways in chosen))
    for where, per_rank in zip(chosen, (alone, *others), strict=True):
        for rank in per_rank:
            assert rank.pop("updated") == [[1, False], [7, True]], where
        for way, found in per_rank[0].items():
            assert found["gap"] < 1e-5, (where, way, found["gap"])
            assert found["lowest"] < -0.5, "every token was certain, which shows little"
            assert all(rank[way]["tokens"] == found["tokens"] for rank in per_rank), (where, way)
            assert found["reasons"] == ["stop" if c[-1] == 50 else "length" for c in found["tokens"]]
    assert alone[0]["T 1"]["tokens"] != alone[0]["greedy"]["tokens"]


@pytest.mark.essential
@pytest.mark.parametrize("family", ["solar_open", "exaone_moe"])
def test_greedy_text_equals_transformers(family: str, hf_models: dict[str, Path], imported: dict[str, Path],
                                         one_rank: None) -> None:
    """Token by token on an exported folder, with prompts of mixed lengths beyond the sliding window of 8
    tokens."""
    model = load_hf(hf_models[family])
    expected = [model.generate(input_ids=torch.tensor([p]), max_new_tokens=24, do_sample=False,
                               pad_token_id=0)[0].tolist() for p in PROMPTS]
    expected = [e[len(p):] for e, p in zip(expected, PROMPTS, strict=True)]
    world.join_world(ParallelConfig())
    try:
        policy = load_forward_model(imported[family], build_inference_config(imported[family], [], 1))
        engine = MegatronEngine(policy)
        assert engine.generate(PROMPTS, Sampling(24)).continuations == expected
        assert (MegatronEngine(policy, Batching(3, 6)).generate(PROMPTS, Sampling(24)).continuations
                == expected)
        with pytest.raises(ValueError, match="prompt 1 has no token"):
            engine.generate([[1], []], Sampling(4))
        assert engine.generate([], Sampling(4)).continuations == []
    finally:
        world.leave_world()
