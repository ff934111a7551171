"""Soft caps: attention against a dense softmax over capped products, losses and divergences of capped logits
against plain torch, alone and with a vocabulary that is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.model import test_divergence as divergences, test_logprobs as labels_of
from tests.head_config import head_config

CAP, TEMPERATURE = 1.5, 0.7
HEADS, KV_HEADS, DIM = 4, 2, 8


def capped(values: torch.Tensor) -> torch.Tensor:
    return CAP * torch.tanh(values / CAP)


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """[b, heads, m, dim], [b, kv_heads, L, dim] twice, bool [m, L] or [b, 1, m, L] -> [b, heads, m, dim]."""
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    return capped(query @ key.transpose(-1, -2) * 0.9).masked_fill(~seen, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("most", [1 << 25, 200, 1])
@pytest.mark.parametrize("seen", ["causal", "one mask", "mask of each"])
def test_attention_and_gradients_are_those_of_capped_products(seen: str, most: int,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is computed at a time, down to one query."""
    from megatron_sov.engine.model import softcap

    monkeypatch.setattr(softcap, "MAX_PRODUCTS", most)
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    length = 7 if seen == "causal" else 11
    ours = [normal(3, heads, n, DIM).requires_grad_() for heads, n in (
        (HEADS, 7), (KV_HEADS, length), (KV_HEADS, length))]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    masks = {"causal": torch.ones(7, 7).tril() > 0, "one mask": normal(7, length) > -0.5,
             "mask of each": normal(3, 1, 7, length) > -0.5}
    masks["one mask"][:, 0] = masks["mask of each"][..., 0] = True
    told: dict[str, Any] = {"is_causal": True} if seen == "causal" else {"attn_mask": masks[seen]}
    found = softcap.soft_capped(*ours, cap=CAP, scale=0.9, enable_gqa=True, **told)
    expected, upstream = dense(*theirs, masks[seen]), normal(3, HEADS, 7, DIM)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-13)


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    """The products of a block are computed again in the backward pass."""
    from megatron_sov.engine.model.softcap import soft_capped

    found = []
    for length in (64, 256):
        row = [torch.randn(1, heads, length, DIM, requires_grad=True)
               for heads in (HEADS, KV_HEADS, KV_HEADS)]
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            soft_capped(*row, cap=CAP, scale=0.9, is_causal=True, enable_gqa=True)
        found.append(sum(kept.values()))
    assert 0 < found[1] <= 4.5 * found[0]


def rows_of_documents(cp: int) -> list[list[float]]:
    """Return for each window how far attention of packed documents, its gradients, and what is read in pieces
    behind a cache are from capped products of each document alone."""
    from megatron.core.transformer import TransformerConfig

    from megatron_sov.engine.model import attention
    from megatron_sov.engine.model.cache_rows import CacheGroup, CacheSize, PackedSpans
    from megatron_sov.engine.model.kv_cache import CachedAttention
    from megatron_sov.engine.model.softcap import kernel_of
    from megatron_sov.engine.parallel import context, world
    from megatron_sov.model.config import ParallelConfig

    world.join(ParallelConfig(cp=cp))
    lengths, random, apart = [6, 6, 12], torch.Generator().manual_seed(0), []
    row = [torch.randn(24, heads, DIM, generator=random, dtype=torch.float64)
           for heads in (HEADS, KV_HEADS, KV_HEADS)]
    upstream = torch.randn(24, HEADS * DIM, generator=random, dtype=torch.float64)
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS)
    packed = attention.pack(torch.tensor([0, 6, 12, 24], dtype=torch.int32), 12, 24)
    for window in (0, 4):
        layer = attention.DocumentAttention(config, 1, None, "self", softmax_scale=0.9, window_tokens=window,
                                            softcap=CAP)
        local = [context.local(t).clone().requires_grad_() for t in row]
        found = layer(*local, None, packed_seq_params=packed)
        found.backward(context.local(upstream))
        whole, parts = [t.clone().requires_grad_() for t in row], []
        for document in zip(*(t.split(lengths) for t in whole), strict=True):
            distance = torch.arange(len(document[0]))[:, None] - torch.arange(len(document[0]))
            seen = (distance >= 0) & ((distance < window) if window else True)
            parts.append(dense(*(t.transpose(0, 1)[None] for t in document), seen)[0].transpose(0, 1))
        expected = torch.cat(parts).flatten(1)
        expected.backward(upstream)
        pairs = [(found, context.local(expected)), *((one.grad, context.local(other.grad))
                                                     for one, other in zip(local, whole, strict=True))]
        cached = CachedAttention(CacheSize(1, 12, 2), 0.9, window, kernel_of(CAP))
        for past, count in ((0, 5), (5, 2), (7, 5)):
            piece = slice(12 + past, 12 + past + count)
            with torch.no_grad():
                pairs.append((cached(*(t[piece] for t in row), None, packed_seq_params=PackedSpans(
                    groups=[CacheGroup(0, 0, count, [past])])), expected[piece]))
        apart.append([float((one - other).abs().max()) for one, other in pairs])
    world.leave()
    return apart


@pytest.mark.distributed
def test_packed_documents_and_cached_ones_are_capped(ranks: Any, job: Any) -> None:
    for per_rank in ranks(*(job(__file__, "rows_of_documents", cp, {"cp": cp}) for cp in (1, 2))):
        for found in per_rank:
            assert all(difference < 1e-12 for window in found for difference in window), found


def of_a_split_head(tp: int, sp: bool) -> dict[str, Any]:
    """Return figures of capped logits in float64 and this process's parts of the gradients of everything that
    is differentiable, with their places."""
    from megatron.core import parallel_state

    from megatron_sov.engine.model.divergence import Divergence, TeacherStates, TeacherTopK
    from megatron_sov.engine.model.logprobs import Head
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import ParallelConfig

    world.join(ParallelConfig(tp=tp, sp=sp))
    rank, tensors = parallel_state.get_tensor_model_parallel_rank(), divergences.whole()
    rows = -(-divergences.VOCABULARY // tp)

    def own(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([weight, 9 * states[:rows * tp - divergences.VOCABULARY]])
        return padded[rank * rows:(rank + 1) * rows].clone()

    teacher_head = own(tensors["teacher weight"], tensors["teacher states"])
    top = teacher_logprobs(tensors).topk(divergences.K)
    teachers = {"states": TeacherStates(tensors["teacher states"], teacher_head, CAP),
                "top-k with the rest": TeacherTopK(top.indices, top.values),
                "top-k alone": TeacherTopK(top.indices, top.values, keep_remainder=False)}
    labels, weights = labels_of.whole()[2], {"first": tensors["first"]}
    local = slice(None) if not sp else slice(rank * len(labels) // tp, (rank + 1) * len(labels) // tp)
    found: dict[str, Any] = {}
    for what in ("cross-entropy", "log-probabilities", *teachers):
        states = tensors["states"][local, None].clone().requires_grad_()
        weight = own(tensors["weight"], tensors["states"]).requires_grad_()
        head = Head(weight, head_config(sp), 5, divergences.VOCABULARY, CAP)
        if what == "cross-entropy":
            sums, values = head.cross_entropy(states, labels, weights)
        elif what == "log-probabilities":
            values = head.logprobs(states, labels, TEMPERATURE)
            sums = {"first": (values * tensors["first"]).sum()}
        else:
            sums, of_row = head.divergence(states, teachers[what], weights, Divergence(0.5, TEMPERATURE))
            values = of_row.divergence
        sums["first"].backward()
        found[what] = {"values": values.tolist(), "states": states.grad[:, 0].tolist(),
                       "weight": weight.grad.tolist()}
    states = tensors["states"][local, None]
    found["logits"] = head.logits(tensors["states"]).tolist()
    found["best"] = [t.tolist() for t in head.best_tokens(tensors["states"])]
    found["most probable"] = [t.tolist() for t in head.most_probable(states, 3, TEMPERATURE)]
    return found


def teacher_logprobs(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return (capped(tensors["teacher states"] @ tensors["teacher weight"].T) / TEMPERATURE).log_softmax(-1)


def expected_of(what: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same by autograd over whole logits."""
    states, weight = (tensors[name].clone().requires_grad_() for name in ("states", "weight"))
    logits, labels = capped(states @ weight.T), labels_of.whole()[2]
    log_p = (logits / TEMPERATURE).log_softmax(-1)
    if what == "cross-entropy":
        values = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    elif what == "log-probabilities":
        values = log_p[torch.arange(len(labels)), labels]
    else:
        values = divergences.reference(*divergences.over_events(what, log_p, teacher_logprobs(tensors)), 0.5)
    (values * tensors["first"]).sum().backward()
    assert states.grad is not None and weight.grad is not None
    return {"values": values.detach(), "states": states.grad, "weight": weight.grad}


@pytest.mark.distributed
def test_losses_of_capped_logits_are_those_of_whole_ones(ranks: Any, job: Any) -> None:
    cases = [(1, False), (2, True), (3, False)]
    results = ranks(*(job(__file__, "of_a_split_head", tp, {"tp": tp, "sp": sp}) for tp, sp in cases))
    tensors, n = divergences.whole(), divergences.VOCABULARY
    logits = capped(tensors["states"] @ tensors["weight"].T)
    for (_, sp), per_rank in zip(cases, results, strict=True):
        for what in ("cross-entropy", "log-probabilities", *divergences.KINDS):
            wanted, parts = expected_of(what, tensors), [result[what] for result in per_rank]
            weight = torch.tensor([row for part in parts for row in part["weight"]], dtype=torch.float64)
            states = [row for part in parts for row in part["states"]] if sp else parts[-1]["states"]
            for found, value in ((parts[0]["values"], wanted["values"]), (states, wanted["states"]),
                                 (weight[:n], wanted["weight"])):
                torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64), value, rtol=1e-10,
                                           atol=1e-12, msg=lambda m, what=what: f"{what}: {m}")
            assert not weight[n:].any(), "no gradient reaches padding"
        for result in per_rank:
            torch.testing.assert_close(torch.tensor(result["logits"], dtype=torch.float64), logits)
            assert result["best"][0] == logits.argmax(-1).tolist()
            top = (logits / TEMPERATURE).log_softmax(-1).topk(3)
            assert result["most probable"][0] == top.indices.tolist()
            torch.testing.assert_close(torch.tensor(result["most probable"][1], dtype=torch.float64),
                                       top.values)
