"""Engines on the suite: each agrees, item by item, with plain transformers calls on one prompt at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sov.eval.needle.suite import Example, NeedleSuite, Way, answers, is_right
from megatron_sov.eval.needle.text import Haystack
from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

prepare_megatron()

from megatron_sov.generate.generator import MegatronEngine  # noqa: E402
from megatron_sov.generate.hf import HfEngine, load_hf  # noqa: E402
from megatron_sov.generate.load import run_forward_model  # noqa: E402
from megatron_sov.generate.target import Target  # noqa: E402

KINDS = ("multi-key", "multi-value")


def batches(haystack: Haystack) -> list[list[Example]]:
    """Examples with and without an order; longer than K-EXAONE's window (8) and Solar's
    original context (256)."""
    suite = NeedleSuite((haystack,), KINDS, (140, 300), (0.4,), 2, 0.2)
    return [examples for _, _, examples in suite.examples()]


@torch.no_grad()
def plain_answer(model: Any, example: Example, words: tuple[int, ...], by: Way) -> list[int]:
    """What transformers says to one prompt, without any of our code."""
    if by == "generation":
        ids = torch.tensor([example.prompt])
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                               max_new_tokens=example.answer_tokens, do_sample=False, eos_token_id=None,
                               pad_token_id=0)
        return found[0, len(example.prompt):].tolist()
    said = []
    ids = list(example.prompt)
    for token in (t for pair in example.answer for t in pair):
        logprobs = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        said.append(max(words, key=lambda word: float(logprobs[word])))
        ids.append(token)
    return said


def plain_verdict(example: Example, said: list[int], by: Way) -> bool:
    """Whether that is right, told from the strings of words alone."""
    wanted = [f"{a}+{b}" for a, b in example.answer]
    given = [f"{said[i]}+{said[i + 1]}" for i in range(0, len(said), 2)]
    if by == "generation" and example.in_any_order:
        return len(given) == len(wanted) and set(given) == set(wanted)
    if by == "generation" or not example.in_any_order:
        return given == wanted
    return all(said[2 * i] in [first for first, _ in example.answer[i:]]
               and said[2 * i + 1] == example.answer[i][1] for i in range(len(wanted)))


@pytest.mark.parametrize("by", ["generation", "likelihood"])
@pytest.mark.parametrize("family", ["solar_open", "exaone_moe"])
def test_every_answer_is_that_of_plain_transformers(family: str, by: Way, imported: dict[str, Path],
                                                    hf_models: dict[str, Path],
                                                    haystacks: dict[str, Haystack], one_rank: None) -> None:
    haystack = haystacks["heldout"]
    words = haystack.form.words
    model = AutoModelForCausalLM.from_pretrained(hf_models[family]).eval()
    reference = [[plain_answer(model, e, words, by) for e in examples] for examples in batches(haystack)]
    engine = HfEngine(load_hf(hf_models[family]))
    ours = [answers(examples, words, engine, by) for examples in batches(haystack)]
    assert ours == reference
    target = Target(imported[family], False)
    assert (run_forward_model(target, [], None, lambda loaded: [
        answers(examples, words, MegatronEngine(loaded.policy), by) for examples in batches(haystack)])
            == reference)
    if by == "likelihood":
        assert all(token in words for rows in reference for row in rows for token in row)

    verdicts = []
    for examples, said in zip(batches(haystack), reference, strict=True):
        for number, (example, tokens) in enumerate(zip(examples, said, strict=True)):
            # an untrained model says nothing right: ask for what it says
            if number % 2 and by == "generation":
                pairs = [(a, b) for a, b in zip(tokens[::2], tokens[1::2], strict=True)]
                example = dataclasses.replace(example, answer=pairs[::-1] if example.in_any_order else pairs)
            verdicts.append((is_right(example, tokens, by), plain_verdict(example, tokens, by)))
    assert all(ours == theirs for ours, theirs in verdicts)
    assert by == "likelihood" or {ours for ours, _ in verdicts} == {True, False}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}), "tp sp": (2, {"tp": 2, "sp": True}), "dp ep": (2, {"ep": 2}), "pp": (2, {"pp": 2}),
    "cp": (2, {"cp": 2})}


def sharded_answers(checkpoint: str, shards: str, layout: dict[str, Any]) -> dict[str, list[list[list[int]]]]:
    """What a checkpoint says at a layout, on this process, by both ways."""
    from megatron_sov.data.token_shards import open_sources
    from megatron_sov.eval.needle.text import open_haystacks
    from megatron_sov.generate.load import load_forward_model
    from megatron_sov.generate.target import inference_config
    from megatron_sov.mcore.parallel import world

    path = Path(checkpoint)
    size = layout.get("tp", 1) * layout.get("ep", 1) * layout.get("pp", 1) * layout.get("cp", 1)
    settings = [f"parallel.{name}={str(value).lower()}" for name, value in layout.items()]
    config = inference_config(path, [*settings, "train.precision=fp64"], size)
    (haystack,) = open_haystacks(open_sources({shards: 1.0}, 1024), "heldout", Path(shards) / "tokenizer")
    world.join(config.parallel)
    engine = MegatronEngine(load_forward_model(path, config))
    suite = NeedleSuite((haystack,), ("multi-key", "multi-query"), (130,), (0.1, 0.8), 2, 0.2)
    found = {by: [answers(e, haystack.form.words, engine, by) for _, _, e in suite.examples()]
             for by in ("generation", "likelihood")}
    world.leave()
    return found


def test_every_layout_says_the_same(ranks, job, imported: dict[str, Path], token_shards: Path) -> None:
    paths = {"checkpoint": str(imported["solar_open"]), "shards": str(token_shards)}
    found = ranks(*(job(__file__, "sharded_answers", n, {**paths, "layout": layout})
                    for n, layout in LAYOUTS.values()))
    expected = found[0][0]
    assert len({token for batch in expected["likelihood"] for answer in batch for token in answer}) > 8
    for name, results in zip(LAYOUTS, found, strict=True):
        assert all(result == expected for result in results), name
