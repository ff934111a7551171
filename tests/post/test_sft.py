"""Loss terms of supervised fine-tuning: response, text and MTP, each a mean over its own tokens or units."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.errors import Fix, UserError
from megatron_sov.commands.train.setup.training import check_chats
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.engine.parallel import collectives, world
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.post.sft import SupervisedFineTuning
from megatron_sov.train.data.rows import PackedRow, join_rows
from megatron_sov.train.objectives.microbatch import build_micro_batch
from megatron_sov.train.objectives.objective import GlobalBatch, compute_total_loss
from tests.head_config import Logits, head_config

TEXT, PROMPT, RESPONSE, LENGTH = 0, 1, 2, 12
VOCAB, ROW = 13, 24
"""Vocabulary and tokens of a row of `build_chat_row`."""
CHATS = ("PPRRRPPRRRRRRPR", "PRPRR", "PPP", "RRR", "PPPRRRRRRRRRRRR", "PRRPPRPRRR")
"""Conversations by the types of their labels, prompt (P) or response (R). "PPP" has nothing to learn."""
ROWS = ((0, 1), (2, 3), (4,), (5, 1))
"""Rows by the indices of their conversations."""


def build_row(kind: int, seed: int) -> PackedRow:
    """Return a document of 10 tokens and 2 of padding: text, or a prompt of 4 labels and a response of 5."""
    labels = np.random.default_rng(seed).integers(1, 32, LENGTH)
    types = np.full(LENGTH, kind, np.uint8)
    weights = np.ones(LENGTH, np.float32)
    if kind == RESPONSE:
        types[:4], weights[:4] = PROMPT, 0
    labels[9:], weights[9:], types[9:] = 0, 0, 0
    return PackedRow(tokens=np.roll(labels, 1), labels=labels, weights=weights, positions=np.arange(LENGTH),
                     types=types, sources=np.full(LENGTH, int(kind == TEXT)), padding=np.arange(LENGTH) >= 10,
                     bounds=np.array([0, 10, LENGTH], np.int32))


def build_config(*settings: str) -> RunConfig:
    return apply_settings(recipes.get("tiny-k-exaone"),
                          ["objective.name=sft", "objective.text_coeff=0.3", *settings])


def compute_terms(num_texts: int, swap_texts: bool) -> dict[str, Any]:
    """Inside a rank: compute the loss terms of one response and some copies of a text, and their expected
    means."""
    config = build_config()
    world.join_world(config.parallel)
    row = join_rows([build_row(RESPONSE, 1)] + [build_row(TEXT, 3 if swap_texts else 2)] * num_texts)
    context: Any = SimpleNamespace(config=config, batches=SimpleNamespace(num_sources=2))
    objective = SupervisedFineTuning(context)
    batch = objective.prepare(GlobalBatch((build_micro_batch(row),), LENGTH, 1 + num_texts, "main"))
    generator = torch.Generator().manual_seed(0)
    # [depths, tokens, 1, hidden]
    response, text = (torch.randn(2, LENGTH, 1, 8, generator=generator) for _ in range(2))
    hidden = torch.cat([response] + [text] * num_texts, dim=1)
    weight = torch.randn(32, 8, generator=generator).requires_grad_()  # a vocabulary of 32 tokens
    head = Head(weight, head_config(), 7, len(weight))
    sums = objective.loss([hidden[0], hidden[1]], head, batch.micro_batches[0])
    loss = compute_total_loss(sums, objective.coefficients, batch.targets)
    loss.backward()
    logprobs = torch.log_softmax(hidden[..., 0, :] @ weight.detach().T, dim=-1)
    losses = [-logprobs[depth].gather(1, torch.from_numpy(np.roll(row.labels, -depth))[:, None])[:, 0]
              for depth in (0, 1)]
    return {"loss": loss.item(), "gradient": weight.grad.tolist(), "targets": dict(batch.targets),
            "tokens": batch.num_tokens,
            "terms": {name: value.item() / batch.targets[name] for name, value in sums.terms.items()},
            "expected": {"response": losses[0][4:9].mean().item(),
                         "text": losses[0][LENGTH:LENGTH + 9].mean().item(),
                         "mtp": losses[1][3:8].mean().item()}}  # the same labels, from one position before


def test_terms_are_means_over_their_own_tokens(ranks: Any, job: Any) -> None:
    (one_text,), (two_texts,), (other_text,) = ranks(*(
        job(__file__, "compute_terms", 1, {"num_texts": num_texts, "swap_texts": swap_texts})
        for num_texts, swap_texts in ((1, False), (2, False), (1, True))))
    assert one_text["targets"] == {"response": 5, "text": 9, "mtp": 5}
    assert two_texts["targets"] == {"response": 5, "text": 18, "mtp": 5}
    assert (one_text["tokens"], two_texts["tokens"]) == (20, 30)
    for result in (one_text, two_texts):
        terms = result["terms"]
        assert terms == pytest.approx(result["expected"], rel=1e-5)
        assert result["loss"] == pytest.approx(
            terms["response"] + 0.3 * terms["text"] + 0.05 * terms["mtp"], rel=1e-6)
    # With twice the text, the text term is a mean over more tokens, and has the same weight.
    assert two_texts["loss"] == pytest.approx(one_text["loss"], rel=1e-6)
    np.testing.assert_allclose(two_texts["gradient"], one_text["gradient"], rtol=1e-5, atol=1e-7)
    # Other text changes only the text term: the other terms have no loss on prompts and text.
    changed = {name for name, value in one_text["terms"].items() if other_text["terms"][name] != value}
    assert changed == {"text"}


def test_without_text_data_there_is_no_text_term() -> None:
    context: Any = SimpleNamespace(config=build_config("objective.text_coeff=0"),
                                   batches=SimpleNamespace(num_sources=1))
    assert SupervisedFineTuning(context).coefficients == {"response": 1.0, "mtp": 0.05}


@pytest.mark.each(("chats", "texts", "coeff", "message"), [
    ([], ["web"], 0.1, r"no source \(web\) contains conversations"),
    (["chat"], ["web"], 0, r"only the text term learns from the text in --data \(web\)"),
    (["chat"], [], 0.1, "text_coeff = 0.1 needs text in addition to conversations"),
])
def test_data_that_leaves_a_term_without_targets(chats: list[str], texts: list[str], coeff: float,
                                                 message: str) -> None:
    sources: Any = [SimpleNamespace(name=n, is_chat=n in chats) for n in [*chats, *texts]]
    with pytest.raises(UserError, match=message):
        check_chats(build_config(f"objective.text_coeff={coeff}"), sources)


def test_data_without_chats_proposes_the_chats_in_the_folder(cwd: Path) -> None:
    Path("chats.jsonl").write_text('{"messages": []}\n')
    Path("texts.jsonl").write_text('{"text": "a"}\n')
    sources: Any = [SimpleNamespace(name="web", is_chat=False)]
    with pytest.raises(UserError, match=r"conversations here: chats.jsonl\Z") as raised:
        check_chats(build_config("objective.text_coeff=0.1"), sources)
    assert raised.value.fix == Fix(options=("--data", "chats.jsonl"))


def build_chat_row(chats: tuple[int, ...], random: np.random.Generator) -> PackedRow:
    """Return conversations and padding; the last token of each has no label."""
    kinds = "".join(CHATS[i] + "." for i in chats)
    types = np.array([{"P": 1, "R": 2, ".": 0}[k] for k in kinds.ljust(ROW, ".")], np.uint8)
    ends = np.cumsum([len(CHATS[i]) + 1 for i in chats])
    filled = int(ends[-1])
    tokens, labels = random.integers(0, VOCAB, ROW), random.integers(0, VOCAB, ROW)
    weights = (types == RESPONSE).astype(np.float32) * random.choice([0.5, 1.0], ROW).astype(np.float32)
    return PackedRow(tokens=tokens, labels=labels, weights=weights,
                     positions=np.arange(ROW), types=types, sources=np.zeros(ROW, np.int64),
                     padding=np.arange(ROW) >= filled,
                     bounds=np.array([0, *ends, *([ROW] if filled < ROW else [])], np.int32))


def build_unit_config(loss_per: str) -> RunConfig:
    return apply_settings(recipes.get("tiny-solar-open"), [
        "objective.name=sft", f"objective.loss_per={loss_per}", "train.precision=fp64"])


def compute_mean_loss(rows: list[PackedRow], logits: list[torch.Tensor], loss_per: str) -> torch.Tensor:
    """Return the mean over units of each unit's weighted mean loss."""
    means = []
    for row, scores in zip(rows, logits, strict=True):
        for first, end in pairwise(row.bounds.tolist()):
            turns: list[list[int]] = []
            for t in range(first, end):
                if row.weights[t] > 0:
                    if not (turns and turns[-1][-1] == t - 1):
                        turns.append([])
                    turns[-1].append(t)
            units = [[t for turn in turns for t in turn]] if loss_per == "sample" and turns else turns
            for unit in units:
                weights = [float(row.weights[t]) for t in unit]
                losses = [-scores[t].log_softmax(-1)[int(row.labels[t])] for t in unit]
                means.append(sum(w * v for w, v in zip(weights, losses, strict=True)) / sum(weights))
    return sum(means) / len(means)  # type: ignore[return-value]


@pytest.mark.parametrize(("loss_per", "units"), [("turn", 12), ("sample", 6)])
def test_every_unit_counts_by_its_own_mean_however_the_batch_is_split(
        loss_per: str, units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "all_reduce_dp", lambda values: values)
    random = np.random.default_rng(0)
    rows = [build_chat_row(chats, random) for chats in ROWS]
    logits = [torch.randn(ROW, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(i),
                          requires_grad=True) for i in range(len(rows))]
    expected = compute_mean_loss(rows, logits, loss_per)
    gradients = torch.autograd.grad(expected, logits)
    context: Any = SimpleNamespace(config=build_unit_config(loss_per), batches=SimpleNamespace(num_sources=1))
    objective = SupervisedFineTuning(context)
    for size in (1, 2, 4):
        split = [range(i, i + size) for i in range(0, len(rows), size)]
        batch = objective.prepare(GlobalBatch(
            tuple(build_micro_batch(join_rows([rows[i] for i in indices])) for indices in split), ROW,
            len(rows), "main"))
        assert batch.targets["response"] == pytest.approx(units, rel=1e-12)
        head: Any = Logits()
        loss: Any = 0.0
        for indices, micro_batch in zip(split, batch.micro_batches, strict=True):
            sums = objective.loss([torch.cat([logits[i] for i in indices])], head, micro_batch)
            loss = loss + compute_total_loss(sums, objective.coefficients, batch.targets)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        for gradient, expected_gradient in zip(torch.autograd.grad(loss, logits), gradients, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)


def test_device_weights_equal_the_counted_weights() -> None:
    """A batch on a GPU also has its rows in host memory, from which targets are counted."""
    context: Any = SimpleNamespace(config=build_unit_config("turn"), batches=SimpleNamespace(num_sources=1))
    host = build_micro_batch(build_chat_row((0, 1), np.random.default_rng(1)))
    sent = SupervisedFineTuning(context)._weigh_responses(dataclasses.replace(host, on_host=host))
    assert sent.on_host is not None and torch.equal(sent.weights, sent.on_host.weights)
    assert float(sent.host.weights.sum()) == pytest.approx(3 + 2)  # turns
