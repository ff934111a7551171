"""Cached generation equals full forward passes at every layout."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

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
from megatron_sov.model.config import ParallelConfig
from tests.tiny import tiny_model

WINDOW, MAX_TOKENS = 8, 8
PROMPTS = [[5, 9, 2, 70], [30], list(range(20, 44)), [7] * 9, [80, 81, 82, 83, 84],
           [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]]
"""Prompts shorter and longer than the sliding window."""
REPEATED = [0, 2, 0, 5, 2, 0, 1, 1, 5, 2]
"""Indices of prompts in a batch in which prompts occur several times."""
LIMITS = [3, 8, 1, 5, 8, 2]
"""Maximum length of each prompt's continuation."""
CONTINUED_ALONE = (1, 2, 5)
"""Indices of prompts that are also continued alone: the shortest, the longest, the last."""
SETTINGS = ["model.init_std=0.3", f"model.sliding_window_tokens={WINDOW}", "model.num_layers=4",
            "model.num_experts=4", "train.precision=fp64"]


def generate_by_each_method(layout: dict[str, Any], *, full: bool = False, in_pieces: bool = False,
                            family: str = "k-exaone", settings: tuple[str, ...] = ()) -> dict[str, Any]:
    """Continue PROMPTS by a random model on this rank, with each kind of sampling, batch and limit.

    Returns the continuations by the name of the method, and further results.

    Args:
        layout: fields of ParallelConfig.
        full: also compute full forward passes, and continue prompts alone and repeated.
        in_pieces: also read prompts in several passes, with slots for few sequences at a time.
        family: family of the model.
        settings: further settings of the model.
    """
    _, model = tiny_model(f"tiny-{family}", *SETTINGS, *settings, layout=layout)
    policy = ForwardModel(model, 50)
    attention = [type(m.core_attention).__name__ for m in model.modules() if hasattr(m, "core_attention")]
    sampling = Sampling(MAX_TOKENS, temperature=1.0, top_k=40, top_p=0.9, seed=3)

    def generate(prompts: Any, sampling: Any, batching: Any = None, **options: Any) -> Any:
        return MegatronEngine(policy, batching).generate(prompts, sampling, **options).continuations

    greedy_with_routes = Sampling(MAX_TOKENS, with_routes=True)
    unbatched = MegatronEngine(policy).generate(PROMPTS, greedy_with_routes)
    greedy = unbatched.continuations
    rows = iter(range(1000))
    # Every rank calls the function, but only the value of rank 0 stops the generation.
    stop_row = 2 if int(os.environ["RANK"]) == 0 else 0
    stopping = GenerationBounds(LIMITS, lambda: next(rows) == stop_row)
    limited = GenerationBounds(LIMITS, lambda: False)
    result = {"greedy": greedy, "routes": [r.tolist() for r in unbatched.routes],
              "sampled": generate(PROMPTS, sampling),
              "stopped early": generate(PROMPTS, Sampling(MAX_TOKENS), bounds=stopping),
              "limited": generate(PROMPTS, Sampling(MAX_TOKENS), bounds=limited)}
    if full:
        result["end"] = greedy[2][5]
        result["stopped"] = generate(PROMPTS, Sampling(MAX_TOKENS), stop=StopRule((result["end"],)))
        result["alone"] = {i: generate([PROMPTS[i]], sampling, streams=[i])[0] for i in CONTINUED_ALONE}
        result |= generate_repeated_prompts(policy, sampling, greedy_with_routes)
        model.config.routing_step.record = record = {}
        result["full"] = []
        for prompt, continuation in zip(PROMPTS, greedy, strict=True):
            batch = DocumentBatch([[*prompt, *continuation]], torch.device("cpu"))
            positions = torch.arange(len(prompt) - 1, len(prompt) + MAX_TOKENS - 1)
            result["full"].append(policy.logits(batch, positions).argmax(-1).tolist())
        model.config.routing_step.record = None
        # The decoder does not read the last token of a continuation, so this token has no route.
        result["full routes"] = [torch.stack([record[layer][i] for layer in sorted(record)], 1)[:-1].tolist()
                                 for i in range(len(PROMPTS))]
    if in_pieces:
        result["pieces"] = generate(PROMPTS, Sampling(MAX_TOKENS), Batching(2, 3))
        request.CACHE_TOKENS = 1
        result["one slot"] = generate(PROMPTS, Sampling(MAX_TOKENS))
    result["as before"] = model.training and attention == [
        type(m.core_attention).__name__ for m in model.modules() if hasattr(m, "core_attention")]
    return result


def generate_repeated_prompts(policy: Any, warm: Any, routed: Any) -> dict[str, Any]:
    """Continue REPEATED prompts in batches of several sizes and one by one.

    Returns:
        The continuations, the routes, and the number of prompt tokens that the model read.
    """
    prompts, num_read = [PROMPTS[i] for i in REPEATED], 0
    original = CachedDecoder.read

    def count_and_read(decoder: Any, spans: Any, row_tokens: int) -> Any:
        nonlocal num_read
        num_read += sum(len(s.tokens) for s in spans if s.past < len(prompts[s.slot]))
        return original(decoder, spans, row_tokens)

    CachedDecoder.read = count_and_read  # type: ignore[method-assign]
    try:
        routes = MegatronEngine(policy).generate(prompts, routed).routes
    finally:
        CachedDecoder.read = original  # type: ignore[method-assign]
    samples = [MegatronEngine(policy, batching).generate(prompts, warm).continuations
               for batching in (None, Batching(4, 7), Batching(10, 5), Batching(3, 1000))]
    return {"repeated": samples, "repeated routes": [r.tolist() for r in routes or ()],
            "prompt tokens read": num_read,
            "one by one": [MegatronEngine(policy).generate([prompt], warm, streams=[i]).continuations[0]
                           for i, prompt in enumerate(prompts)]}


LAYOUTS = {
    "PP2 VPP2": (2, {"pp": 2, "vpp": 2}),
    "EP2, experts by gathering": (2, {"ep": 2, "expert_dispatcher": "allgather"}),
    "TP2+SP x CP2, EP4": (4, {"tp": 2, "sp": True, "cp": 2, "ep": 4}),
}


def check_equal_continuations(result: dict[str, Any]) -> None:
    """Fail unless all results of `generate_by_each_method` on one rank agree."""
    greedy = result["greedy"]
    assert greedy == result["full"], "cached decoding differs from a full forward pass"
    assert result["routes"] == result["full routes"] and greedy != result["sampled"]
    assert result["alone"] == {str(i): result["sampled"][i] for i in CONTINUED_ALONE}, (
        "a prompt's samples depend on the other prompts of its batch")
    assert result["repeated"] == [result["one by one"]] * 4, "a shared prompt has other continuations"
    assert result["repeated routes"] == [result["routes"][i] for i in REPEATED]
    # A repeated prompt is read once, except for its last token: each sequence needs its logits.
    unique = set(REPEATED)
    assert result["prompt tokens read"] == (
        sum(len(PROMPTS[i]) for i in unique) + len(REPEATED) - len(unique))
    assert len({tuple(c) for c in greedy}) == len(PROMPTS) and {len(c) for c in greedy} == {MAX_TOKENS}
    end = result["end"]
    assert result["stopped"] == [c[:c.index(end) + 1] if end in c else c for c in greedy]
    assert result["as before"]
    assert result["limited"] == [c[:limit] for c, limit in zip(greedy, LIMITS, strict=True)]
    # The generation stops in its third forward pass, and each pass generates one token per sequence.
    assert result["stopped early"] == [c[:min(limit, 3)] for c, limit in zip(greedy, LIMITS, strict=True)]


@pytest.mark.distributed
@pytest.mark.deep
@pytest.mark.parametrize("names", [["TP2+SP x CP2, EP4"], ["PP2 VPP2", "EP2, experts by gathering"]],
                         ids=["all kinds", "gathering"])
def test_generation_is_equal_at_every_layout(ranks, job, names: list[str]) -> None:
    one_rank, *split_results = ranks(
        job(__file__, "generate_by_each_method", 1, {"layout": {}, "full": True, "in_pieces": True}),
        *(job(__file__, "generate_by_each_method", n, {"layout": x}) for n, x in map(LAYOUTS.get, names)))
    check_equal_continuations(one_rank[0])
    assert one_rank[0]["pieces"] == one_rank[0]["one slot"] == one_rank[0]["greedy"]
    for name, per_rank in zip(names, split_results, strict=True):
        for rank, result in enumerate(per_rank):
            for method in ("greedy", "routes", "sampled", "limited", "as before"):
                assert result[method] == one_rank[0][method], (name, rank, method)
            assert result["stopped early"] == per_rank[0]["stopped early"]
            assert all(0 < len(c) <= 3 for c in result["stopped early"]), "another rank than 0 stopped it"


FAMILY_SETTINGS = {"k-exaone": SETTINGS[:-1], "solar-open": [*SETTINGS[:-1], "model.sliding_window_tokens=0"],
                   "qwen3": []}


def compare_logprobs(layout: dict[str, Any], family: str, methods: list[str]) -> dict[str, Any]:
    """Compare the engine's log-probabilities with the trainer's (fp32), on this rank.

    Args:
        layout: fields of ParallelConfig.
        family: family of the model.
        chosen: ways of sampling.

    Returns:
        Way -> largest difference and other figures; "updated" -> for an engine of another model, its version
        and whether it generates the same as this model, before and after it gets this model's weights.
    """
    config, model = tiny_model(f"tiny-{family}", *FAMILY_SETTINGS[family], "train.precision=fp32",
                               layout=layout)
    policy = ForwardModel(model, 7)

    def compute_trainer_logprobs(row: list[int], temperature: float) -> torch.Tensor:
        """Return the log-probability of each token of a row except the first."""
        batch = DocumentBatch([row], torch.device("cpu"))
        if temperature not in (0, 1):
            logits = policy.logits(batch, torch.arange(len(row) - 1)).double() / temperature
            return logits.log_softmax(-1)[torch.arange(len(row) - 1), torch.tensor(row[1:])]
        labels = batch.inputs.tokens.roll(-1)
        logprobs = policy.map([batch], lambda hidden, head, _: head.logprobs(hidden[0], labels))
        on_last_stage = logprobs[0] if logprobs else torch.zeros(len(labels))
        return collectives.broadcast_from_last_stage(on_last_stage)[:len(row) - 1]

    def generate_and_compare(sampling: Sampling) -> dict[str, Any]:
        sampling = dataclasses.replace(sampling, with_routes=not layout)
        result = MegatronEngine(policy, Batching(3, 5)).generate(FEW_PROMPTS, sampling, stop=StopRule((50,)))
        record = model.config.routing_step.record = {} if sampling.with_routes else None
        gaps = []
        for prompt, tokens, logprobs in zip(FEW_PROMPTS, result.continuations, result.logprobs, strict=True):
            expected = compute_trainer_logprobs([*prompt, *tokens], sampling.temperature)[len(prompt) - 1:]
            gaps.append((expected - torch.tensor(logprobs)).abs().max())
        model.config.routing_step.record = None
        for i, routes in enumerate(result.routes or ()):
            trainer_routes = torch.stack([record[layer][i] for layer in sorted(record)], 1)[:-1]
            assert torch.equal(trainer_routes, torch.from_numpy(routes).long()), "the trainer's routes differ"
        return {"gap": float(max(gaps)), "tokens": result.continuations, "reasons": result.finish_reasons,
                "lowest": min(map(min, result.logprobs))}

    sampling_by_method = {"greedy": Sampling(MAX_TOKENS), "T 1": Sampling(MAX_TOKENS, 1.0, seed=3),
                          "T 0.7": Sampling(MAX_TOKENS, 0.7, seed=3)}
    results: dict[str, Any] = {name: generate_and_compare(sampling_by_method[name]) for name in methods}
    other_model = build_model(config.model, config.parallel, config.train)
    initial_weights.initialize_weights(other_model, config.model, 2)
    engine = MegatronEngine(ForwardModel(other_model, 7))
    versions = []
    for weights, version in ((None, 1), (export_weights(model, everywhere=True), 7)):
        engine.update(weights, version)
        result = engine.generate(FEW_PROMPTS, sampling_by_method["T 1"], stop=StopRule((50,)))
        versions.append((result.version, result.continuations == results["T 1"]["tokens"]))
    results["updated"] = versions
    return results


FEW_PROMPTS = PROMPTS[1:5]
"""One more than the engine's batch of three."""
LOGPROB_CASES = [("k-exaone", 1, {}, ["greedy", "T 1", "T 0.7"]),
                 ("qwen3", 2, {"tp": 2, "sp": True}, ["T 1", "T 0.7"]),
                 ("k-exaone", 2, {"pp": 2}, ["T 1", "T 0.7"]),
                 ("solar-open", 2, {"ep": 2}, ["T 1", "T 0.7"])]
"""(family, processes, layout, ways of sampling)."""


@pytest.mark.distributed
@pytest.mark.essential
@pytest.mark.parametrize("case_indices", [[1], pytest.param([2, 3], marks=pytest.mark.deep)],
                         ids=["tensors", "stages and experts"])
def test_logprobs_equal_those_of_the_trainer(ranks, job, case_indices: list[int]) -> None:
    """At the first of `LOGPROB_CASES`, and the cases of `case_indices`."""
    cases = [LOGPROB_CASES[i] for i in (0, *case_indices)]
    one_rank, *split_results = ranks(*(
        job(__file__, "compare_logprobs", n, {"layout": layout, "family": family, "methods": methods})
        for family, n, layout, methods in cases))
    for case, per_rank in zip(cases, (one_rank, *split_results), strict=True):
        for rank in per_rank:
            assert rank.pop("updated") == [[1, False], [7, True]], case
        for method, result in per_rank[0].items():
            assert result["gap"] < 1e-5, (case, method, result["gap"])
            assert result["lowest"] < -0.5, "a test with tokens of probability 1 would show little"
            assert all(rank[method]["tokens"] == result["tokens"] for rank in per_rank), (case, method)
            assert result["reasons"] == ["stop" if c[-1] == 50 else "length" for c in result["tokens"]]
    assert one_rank[0]["T 1"]["tokens"] != one_rank[0]["greedy"]["tokens"]


@pytest.mark.essential
@pytest.mark.parametrize("family", ["solar_open", "exaone_moe"])
def test_greedy_text_equals_transformers(family: str, hf_models: dict[str, Path], imported: dict[str, Path],
                                         one_rank: None) -> None:
    """With prompts of mixed lengths, also longer than the sliding window of 8 tokens."""
    model = load_hf(hf_models[family])
    expected = []
    for prompt in PROMPTS:
        ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=24, do_sample=False,
                             pad_token_id=0)[0].tolist()
        expected.append(ids[len(prompt):])
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
