"""Held-out loss and bits per byte, compared with transformers and the bytes of the texts."""

import itertools
import json
import math
import random
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
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


def evaluate_initial_model(data: str, out: str | None, cp: int = 1,
                           recipe: str = "tiny-solar-open") -> dict[str, Any]:
    """Inside ranks: evaluate the initial weights on all held-out text.

    Args:
        data: folder of packed data.
        out: folder to which the weights are saved as a checkpoint, or None.
        cp: context parallelism.
        recipe: recipe of the model.
    """
    trainer = tiny_trainer(
        data, "model.num_layers=1", 'data.phases=[{"name": "main", "seq_len": 48}]',
        "train.global_batch_size=4", "train.micro_batch_size=2", "data.heldout_tokens=100000",
        f"parallel.cp={cp}", recipe=recipe)
    results = {name: asdict(r) for name, r in trainer.evaluate().items()}
    if out is not None:
        save_checkpoint(Path(out), trainer.model, None, {"step": 0, "tokens": 0},
                        trainer.config.to_dict(), tokenizer_folder(trainer.sources))
    return results


@pytest.mark.distributed
def test_loss_and_bits_per_byte_by_brute_force(ranks: Any, job: Any, packed_data: Any,
                                               tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "checkpoint"
    (one_rank,), two_ranks, context_parallel = ranks(
        job(__file__, "evaluate_initial_model", 1, {"data": str(packed_data.text), "out": str(out)}),
        job(__file__, "evaluate_initial_model", 2, {"data": str(packed_data.text), "out": None}),
        job(__file__, "evaluate_initial_model", 2, {"data": str(packed_data.text), "out": None, "cp": 2}))
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
            # The first token of a document is no target, and its end-of-sequence token has no bytes.
            size_bytes += len(text.encode()) - len(first.encode())
            end, targets = 1, targets + int(length) - 1
            # Documents longer than 48 tokens are read in windows of 48 tokens that overlap by half.
            while end < length:
                num_new = min(48 if end == 1 else 24, length - end)
                end += num_new
                window = ids[max(0, end - 49):end]
                with torch.no_grad():
                    logits = model(input_ids=window[None, :-1], use_cache=False).logits[0, -num_new:]
                nats += torch.nn.functional.cross_entropy(logits, window[-num_new:], reduction="sum").item()
        for results in (one_rank, *two_ranks, *context_parallel):
            assert results[source.name]["tokens"] == targets
            assert results[source.name]["loss"] == pytest.approx(nats / targets, rel=1e-6)
            assert results[source.name]["bits_per_byte"] == pytest.approx(
                nats / math.log(2) / size_bytes, rel=1e-6)
    assert json.dumps(one_rank).count("NaN") == 0


def count_drafts() -> list[list[float]]:
    """Inside a rank: count the accepted drafts of random tokens, by the evaluator and by a loop over
    documents.

    Returns both counts: [accepted drafts, drafts].
    """
    generator = torch.Generator().manual_seed(3)
    bounds = [0, 7, 8, 20, 24]
    num_tokens = bounds[-1]
    trunk_tokens, drafts = (torch.randint(3, (num_tokens,), generator=generator) for _ in range(2))
    weights = (torch.rand(num_tokens, generator=generator) > 0.2).float()
    head: Any = SimpleNamespace(predict_row=lambda states: states)
    inputs: Any = SimpleNamespace(cu_seqlens=torch.tensor(bounds))
    batch = MicroBatch(inputs, torch.arange(num_tokens), weights, types=torch.zeros(num_tokens),
                       sources=torch.zeros(num_tokens))
    accepted = counted = 0
    for first, end in itertools.pairwise(bounds):
        for position in range(first, end - 1):
            if weights[position + 1] > 0:
                counted += 1
                accepted += int(drafts[position] == trunk_tokens[position + 1])
    return [_count_accepted_drafts([trunk_tokens, drafts], head, batch).tolist(), [accepted, counted]]


@pytest.mark.distributed
def test_accepted_drafts_are_those_that_the_trunk_then_chooses(ranks: Any, job: Any,
                                                               packed_data: Any) -> None:
    arguments = {"data": str(packed_data.text), "out": None, "recipe": "tiny-k-exaone"}
    ((counts, expected_counts),), (one_rank,), context_parallel, (without_mtp,) = ranks(
        job(__file__, "count_drafts"), job(__file__, "evaluate_initial_model", 1, arguments),
        job(__file__, "evaluate_initial_model", 2, {**arguments, "cp": 2}),
        job(__file__, "evaluate_initial_model", 1, {**arguments, "recipe": "tiny-solar-open"}))
    assert counts == expected_counts and 0 < expected_counts[0] < expected_counts[1]
    for name, result in one_rank.items():
        assert 0 <= result["mtp_acceptance"] < 1
        assert all(results[name]["mtp_acceptance"] == result["mtp_acceptance"]
                   for results in context_parallel)
        assert without_mtp[name]["mtp_acceptance"] is None


def evaluate_turns(data: str) -> dict[str, Any]:
    """Inside a rank: evaluate a model that gives each token its id, modulo 7, as loss."""
    head = SimpleNamespace(logprobs=lambda hidden, labels: -(labels % 7).float())
    policy: Any = SimpleNamespace(map=lambda batches, work: [work([None], head, batch) for batch in batches])
    place = world.join_world(ParallelConfig())
    evaluator = HeldoutEvaluator(open_sources({data: 1.0}, 368), None, 48, 2, 10**6, place)
    return {name: asdict(result) for name, result in evaluator.run(policy).items()}


def decode_turn(ids: Any, types: Any, position: int, tokenizer: Any) -> str:
    """Return the text of the assistant turn (tokens of type 2) that contains the token at `position`."""
    begin, end = position, position
    while types[begin - 1] == 2:
        begin -= 1
    while end < len(ids) and types[end] == 2:
        end += 1
    return str(tokenizer.decode(ids[begin:end]))


def pack_chats(tokenizer: Path, folder: Path) -> Path:
    """Pack 40 chats with thoughts, some with tool calls; documents may be longer than a row of 48 tokens."""
    chats = []
    for i in range(40):
        call = "<tool_call>{}</tool_call>" if i % 2 else ""
        chats.append({"messages": [
            {"role": role, "content": f"<think>{turn}</think>{role[0]}{i * turn} and {i}{call}"}
            for turn in range(1, 2 + i % 3) for role in ("user", "assistant")]})
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    assert sov_data(["pack", "--tokenizer", str(tokenizer), "--heldout", "0.4", "--workers", "1",
                     "--format", "chat", "--input", str(folder / "chats.jsonl"),
                     "--output", str(folder / "chats")]) == 0
    return folder / "chats"


def list_losses_by_region(shard: Any, tokenizer: Any) -> dict[str, list[int]]:
    """Return the losses (id modulo 7) of all assistant tokens by turn ("first", "later") and by kind
    ("thought", "call", "answer"). The position at which a token begins decides its kind."""
    losses = defaultdict[str, list[int]](list)
    for document, length in enumerate(map(int, shard.lengths)):
        ids, types = shard.tokens(document, 0, length), shard.types(document, 0, length)
        turn, turn_start = 0, ""  # number of the turn, and its text before the token
        for i in range(1, length):
            if types[i] != 2:
                continue
            if types[i - 1] != 2:
                turn, turn_start = turn + 1, ""
            losses["first" if turn == 1 else "later"].append(ids[i] % 7)
            call_position = decode_turn(ids, types, i, tokenizer).find("<tool_call>")
            kind = "call" if 0 <= call_position <= len(turn_start) else "answer"
            if "</think>" not in turn_start:
                kind = "thought"
            losses[kind].append(ids[i] % 7)
            turn_start += tokenizer.decode(ids[i:i + 1])
    return losses


@pytest.mark.deep
@pytest.mark.distributed
def test_turn_marks_and_turn_contents_are_measured_separately(ranks: Any, job: Any, packed_data: Any,
                                                              tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    chats = pack_chats(packed_data.tokenizer, tmp_path)
    (source,) = open_sources({str(chats): 1.0}, 368)
    shard = source.open_split("heldout")
    losses = list_losses_by_region(shard, AutoTokenizer.from_pretrained(packed_data.tokenizer))
    means = {name: {"loss": pytest.approx(sum(values) / len(values), rel=1e-12), "tokens": len(values)}
             for name, values in losses.items()}
    turns = {name: means[name] for name in ("first", "later")}
    kinds = {name: means[name] for name in ("thought", "call", "answer")}
    one_rank, two_ranks, (initial_model,), context_parallel = ranks(
        job(__file__, "evaluate_turns", 1, {"data": str(chats)}),
        job(__file__, "evaluate_turns", 2, {"data": str(chats)}),
        job(__file__, "evaluate_initial_model", 1, {"data": str(chats), "out": None}),
        job(__file__, "evaluate_initial_model", 2, {"data": str(chats), "out": None, "cp": 2}))
    for results in (*one_rank, *two_ranks):
        assert (results["chats"]["turns"], results["chats"]["kinds"]) == (turns, kinds)
        assert results["chats"]["tokens"] == len(losses["first"]) + len(losses["later"])
    for results in context_parallel:
        for field in ("turns", "kinds"):
            for name, figures in initial_model["chats"][field].items():
                assert results["chats"][field][name] == pytest.approx(figures, rel=1e-6)
    heldout = open_heldout({str(chats): 1.0}, 48, 10**6)
    segments = [segment for row in heldout.rows(0) for _, _, segment in row.origins]
    assert all(count == min(48, shard.lengths[document]) for document, _, count in segments), (
        "only a document longer than a row is read in windows")
    evaluated = evaluate_rows(heldout, lambda row: row.labels % 7)["chats"]
    assert {name: vars(mean) for name, mean in evaluated.turns.items()} == turns
    assert {name: vars(mean) for name, mean in evaluated.kinds.items()} == kinds


def train_after_evaluation(data: str) -> dict[str, Any]:
    """Inside a rank: take two steps without, and two with an evaluation before them.

    Returns the bits of losses and gradient norms, and whether the evaluation leaves the random states
    unchanged.
    """
    losses, same_state = [], []

    def get_random_states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    for evaluates in (False, True):
        trainer = tiny_trainer(
            data, "model.num_layers=1", 'data.phases=[{"name": "main", "seq_len": 48}]',
            "train.global_batch_size=4", "train.micro_batch_size=2", "train.hidden_dropout=0.2",
            "train.num_threads=1")
        before = get_random_states()
        if evaluates:
            trainer.evaluate()
        same_state.append(get_random_states() == before)
        steps = [train_step(trainer) for _ in range(2)]
        losses.append([[step.loss.hex(), step.grad_norm.hex()] for step in steps if step is not None])
        trainer.close()
        world.leave_world()
    return {"losses": losses, "same_state": same_state}


@pytest.mark.distributed
def test_an_evaluation_before_the_first_step_changes_no_bit(ranks: Any, job: Any, packed_data: Any) -> None:
    ((result,),) = ranks(job(__file__, "train_after_evaluation", 1, {"data": str(packed_data.text)}))
    assert result["losses"][0] == result["losses"][1] and len(result["losses"][0]) == 2
    assert result["same_state"] == [True, True]
