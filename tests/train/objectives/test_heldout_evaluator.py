"""Held-out loss and bits per byte, compared with transformers and the bytes of the texts."""

import itertools
import json
import math
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.cli import main as sov_data
from megatron_sov.convert import to_hf
from megatron_sov.engine.parallel import world
from megatron_sov.eval.heldout_loss import evaluate_rows, open_heldout
from megatron_sov.model.config import ParallelConfig
from megatron_sov.train.data.sources import open_sources, tokenizer_folder
from megatron_sov.train.loop import train_step
from megatron_sov.train.objectives.heldout_evaluator import HeldoutEvaluator, _count_accepted_drafts
from megatron_sov.train.objectives.microbatch import MicroBatch
from tests.checkpoints import save_checkpoint
from tests.tiny import tiny_trainer


def evaluation(data: str, out: str | None, cp: int = 1, recipe: str = "tiny-solar-open") -> dict[str, Any]:
    """Runs inside ranks: evaluate initial weights on everything held out; OUT is written as a checkpoint."""
    trainer = tiny_trainer(
        data, "model.num_layers=1", 'data.phases=[{"name": "main", "seq_len": 48}]',
        "train.global_batch_size=4", "train.micro_batch_size=2", "data.heldout_tokens=100000",
        f"parallel.cp={cp}", recipe=recipe)
    results = {name: asdict(r) for name, r in trainer.evaluate().items()}
    if out is not None:
        save_checkpoint(Path(out), trainer.model, None, {"step": 0, "tokens": 0},
                             trainer.config.to_dict(), tokenizer_folder(trainer.sources))
    world.leave_world()
    return results


@pytest.mark.distributed
def test_loss_and_bits_per_byte_by_brute_force(ranks: Any, job: Any, packed_data: Any,
                                               tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "checkpoint"
    (alone,), shared, cut = ranks(
        job(__file__, "evaluation", 1, {"data": str(packed_data.text), "out": str(out)}),
        job(__file__, "evaluation", 2, {"data": str(packed_data.text), "out": None}),
        job(__file__, "evaluation", 2, {"data": str(packed_data.text), "out": None, "cp": 2}))
    to_hf(out, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(packed_data.tokenizer)
    for source in open_sources({str(packed_data.text): 1.0}, 368):
        shard = source.open_split("heldout")
        targets = size_bytes = 0
        nats = 0.0
        for document, length in enumerate(shard.lengths):
            ids = torch.from_numpy(shard.tokens(document, 0, length))
            text, first = tokenizer.decode(ids[:-1]), tokenizer.decode(ids[:1])
            # a document's first token is not a target, and its eos has no bytes
            size_bytes += len(text.encode()) - len(first.encode())
            end, targets = 1, targets + int(length) - 1
            while end < length:  # whole, or windows of 48 tokens that overlap by half
                new = min(48 if end == 1 else 24, length - end)
                end += new
                window = ids[max(0, end - 49):end]
                with torch.no_grad():
                    logits = model(input_ids=window[None, :-1], use_cache=False).logits[0, -new:]
                nats += torch.nn.functional.cross_entropy(logits, window[-new:], reduction="sum").item()
        for found in (alone, *shared, *cut):
            assert found[source.name]["tokens"] == targets
            assert found[source.name]["loss"] == pytest.approx(nats / targets, rel=1e-6)
            assert found[source.name]["bits_per_byte"] == pytest.approx(
                nats / math.log(2) / size_bytes, rel=1e-6)
    assert json.dumps(alone).count("NaN") == 0


def drafts() -> list[list[float]]:
    """Runs inside a rank: count accepted drafts of random tokens; return the counts of the evaluator and of a
    loop over documents."""
    from types import SimpleNamespace

    generator = torch.Generator().manual_seed(3)
    bounds = [0, 7, 8, 20, 24]
    n = bounds[-1]
    chosen, drafted = (torch.randint(3, (n,), generator=generator) for _ in range(2))
    weights = (torch.rand(n, generator=generator) > 0.2).float()
    head = SimpleNamespace(predict_row=lambda states: states)
    inputs: Any = SimpleNamespace(cu_seqlens=torch.tensor(bounds))
    batch = MicroBatch(inputs, torch.arange(n), weights, types=torch.zeros(n), sources=torch.zeros(n))
    accepted = counted = 0
    for first, end in itertools.pairwise(bounds):
        for place in range(first, end - 1):
            if weights[place + 1] > 0:
                counted += 1
                accepted += int(drafted[place] == chosen[place + 1])
    return [_count_accepted_drafts([chosen, drafted], head, batch).tolist(), [accepted, counted]]  # type: ignore[arg-type]


@pytest.mark.distributed
def test_accepted_drafts_are_those_that_the_trunk_then_chooses(ranks: Any, job: Any,
                                                               packed_data: Any) -> None:
    arguments = {"data": str(packed_data.text), "out": None, "recipe": "tiny-k-exaone"}
    ((found, counted),), (alone,), cut, (without,) = ranks(
        job(__file__, "drafts"), job(__file__, "evaluation", 1, arguments),
        job(__file__, "evaluation", 2, {**arguments, "cp": 2}),
        job(__file__, "evaluation", 1, {**arguments, "recipe": "tiny-solar-open"}))
    assert found == counted and 0 < counted[0] < counted[1]
    for name, result in alone.items():
        assert 0 <= result["mtp_acceptance"] < 1
        assert all(part[name]["mtp_acceptance"] == result["mtp_acceptance"] for part in cut)
        assert without[name]["mtp_acceptance"] is None


def losses_of_turns(data: str) -> dict[str, Any]:
    """Runs inside a rank: evaluate a model for which the loss of a token is its id, modulo 7."""
    from types import SimpleNamespace

    head = SimpleNamespace(logprobs=lambda hidden, labels: -(labels % 7).float())
    policy: Any = SimpleNamespace(map=lambda batches, work: [work([None], head, batch) for batch in batches])
    place = world.join_world(ParallelConfig())
    evaluator = HeldoutEvaluator(open_sources({data: 1.0}, 368), None, 48, 2, 10**6, place)
    found = {name: asdict(result) for name, result in evaluator.run(policy).items()}
    world.leave_world()
    return found


def said_of(ids: Any, types: Any, inside: int, tokenizer: Any) -> str:
    """Return the text of the learned turn in which a token stands."""
    begin, end = inside, inside
    while types[begin - 1] == 2:
        begin -= 1
    while end < len(ids) and types[end] == 2:
        end += 1
    return str(tokenizer.decode(ids[begin:end]))


@pytest.mark.deep
@pytest.mark.distributed
def test_turn_marks_and_turn_contents_are_measured_separately(ranks: Any, job: Any, packed_data: Any,
                                                              tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    def turns(i: int, count: int) -> list[dict[str, str]]:
        call = "<tool_call>{}</tool_call>" if i % 2 else ""
        return [{"role": role, "content": f"<think>{k}</think>{role[0]}{i * k} and {i}{call}"}
                for k in range(1, count + 1) for role in ("user", "assistant")]

    (tmp_path / "chats.jsonl").write_text("\n".join(
        json.dumps({"messages": turns(i, 1 + i % 3)}) for i in range(40)))
    assert sov_data(["pack", "--tokenizer", str(packed_data.tokenizer), "--heldout", "0.4", "--workers", "1",
                     "--format", "chat", "--input", str(tmp_path / "chats.jsonl"),
                     "--output", str(tmp_path / "chats")]) == 0
    (source,) = open_sources({str(tmp_path / "chats"): 1.0}, 368)
    shard, losses = source.open_split("heldout"), defaultdict[str, list[int]](list)
    tokenizer = AutoTokenizer.from_pretrained(packed_data.tokenizer)
    for document, length in enumerate(map(int, shard.lengths)):
        # some are longer than a row of 48 tokens
        ids, types = shard.tokens(document, 0, length), shard.types(document, 0, length)
        turn, said = 0, ""
        for i in range(1, length):
            if types[i] == 2:
                turn, said = (turn, said) if types[i - 1] == 2 else (turn + 1, "")
                losses["first" if turn == 1 else "later"].append(ids[i] % 7)
                # the region in which the token begins decides
                place, call = len(said), said_of(ids, types, i, tokenizer).find("<tool_call>")
                losses["thought" if "</think>" not in said else
                       "call" if 0 <= call <= place else "answer"].append(ids[i] % 7)
                said += tokenizer.decode(ids[i:i + 1])
    turns, kinds = ({part: {"loss": pytest.approx(sum(losses[part]) / len(losses[part]), rel=1e-12),
                            "tokens": len(losses[part])} for part in parts}
                    for parts in (("first", "later"), ("thought", "call", "answer")))
    data = str(tmp_path / "chats")
    one, two, (alone,), cut = ranks(
        job(__file__, "losses_of_turns", 1, {"data": data}),
        job(__file__, "losses_of_turns", 2, {"data": data}),
        job(__file__, "evaluation", 1, {"data": data, "out": None}),
        job(__file__, "evaluation", 2, {"data": data, "out": None, "cp": 2}))
    for found in (*one, *two):
        assert (found["chats"]["turns"], found["chats"]["kinds"]) == (turns, kinds)
        assert found["chats"]["tokens"] == len(losses["first"]) + len(losses["later"])
    for part in ("turns", "kinds"):
        for name, figures in alone["chats"][part].items():
            assert all(found["chats"][part][name] == pytest.approx(figures, rel=1e-6) for found in cut)
    heldout = open_heldout({data: 1.0}, 48, 10**6)
    segments = [segment for row in heldout.rows(0) for _, _, segment in row.origins]
    assert all(count == min(48, shard.lengths[document]) for document, _, count in segments), (
        "only a document longer than a row is read in windows")
    judged = evaluate_rows(heldout, lambda row: row.labels % 7)["chats"]
    assert {part: vars(of) for part, of in judged.turns.items()} == turns
    assert {part: vars(of) for part, of in judged.kinds.items()} == kinds


def first_losses(data: str) -> dict[str, Any]:
    """Runs in a rank: losses of two steps without and with an evaluation before them."""
    import random

    losses, same_state = [], []
    for evaluates in (False, True):
        trainer = tiny_trainer(
            data, "model.num_layers=1", 'data.phases=[{"name": "main", "seq_len": 48}]',
            "train.global_batch_size=4", "train.micro_batch_size=2", "train.hidden_dropout=0.2",
            "train.num_threads=1")
        before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
        if evaluates:
            trainer.evaluate()
        same_state.append(bool(torch.equal(before[0], torch.get_rng_state()))
                          and before[1:] == (random.getstate(), np.random.get_state()[1].tolist()))
        steps = [train_step(trainer) for _ in range(2)]
        losses.append([[step.loss.hex(), step.grad_norm.hex()] for step in steps if step is not None])
        trainer.close()
        world.leave_world()
    return {"losses": losses, "same_state": same_state}


@pytest.mark.distributed
def test_an_evaluation_before_the_first_step_changes_no_bit(ranks: Any, job: Any, packed_data: Any) -> None:
    ((found,),) = ranks(job(__file__, "first_losses", 1, {"data": str(packed_data.text)}))
    assert found["losses"][0] == found["losses"][1] and len(found["losses"][0]) == 2
    assert found["same_state"] == [True, True]
