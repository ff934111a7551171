"""Cross-entropy, log-probabilities, best tokens and logits from a split head,
against torch over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import pytest

from tests.head_config import head_config

TOKENS, HIDDEN, VOCABULARY = 12, 16, 40


def whole() -> tuple[Any, Any, Any, Any]:
    """Return hidden states, head weight (with two rows alike), labels and the gradient from above."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    weight[30] = weight[3] = 3 * weight[3]  # a tie over the border between two processes
    return (torch.randn(TOKENS, HIDDEN, generator=generator), weight,
            torch.randint(VOCABULARY, (TOKENS,), generator=generator),
            torch.randn(TOKENS, generator=generator))


def score(tp: int, sp: bool, chunk_tokens: int) -> dict[str, Any]:
    """Return this process's results and its parts of the gradients; rows that pad the vocabulary
    would beat every token."""

    import torch

    from megatron_sov.engine.model.logprobs import Head
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import ParallelConfig

    place = world.join(ParallelConfig(tp=tp, sp=sp))
    hidden, weight, labels, upstream = whole()
    rows = -(-VOCABULARY // tp)
    weight = torch.cat([weight, 9 * hidden[:rows * tp - VOCABULARY]])
    part = weight[place.rank * rows:(place.rank + 1) * rows].clone().requires_grad_()
    local = (hidden.chunk(tp)[place.rank] if sp else hidden)[:, None].clone().requires_grad_()
    head = Head(part, head_config(sp), chunk_tokens, VOCABULARY)
    logprobs = head.logprobs(local, labels)
    (logprobs * upstream).sum().backward()
    return {"logprobs": logprobs.tolist(), "hidden_grad": local.grad[:, 0].tolist(),
            "weight_grad": part.grad.tolist(), "top": head.top_tokens(hidden).tolist(),
            "logits": head.logits(hidden).tolist()}


@pytest.mark.distributed
def test_a_split_head_scores_like_a_whole_one(ranks, job) -> None:
    import torch

    cases = [(1, False, 64), (1, False, 5), (2, False, 1), (2, False, 5), (2, True, 5), (2, True, 12),
             (3, True, 5)]
    results = ranks(*(job(__file__, "score", tp, {"tp": tp, "sp": sp, "chunk_tokens": c})
                      for tp, sp, c in cases))
    hidden, weight, labels, upstream = (t.double() if t.is_floating_point() else t for t in whole())
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = hidden @ weight.T
    expected = logits.log_softmax(-1)[torch.arange(TOKENS), labels]
    (expected * upstream).sum().backward()
    best = logits.detach().clone()
    best[:, 30] = -torch.inf  # of equal logits the lowest id wins
    assert (best.argmax(-1) == 3).any()
    for (_, sp, _), per_rank in zip(cases, results, strict=True):
        for result in per_rank:
            assert torch.allclose(torch.tensor(result["logprobs"]).double(), expected, atol=1e-5)
            assert torch.allclose(torch.tensor(result["logits"]).double(), logits, atol=1e-4)
            assert result["top"] == best.argmax(-1).tolist()
        hidden_grad = ([row for r in per_rank for row in r["hidden_grad"]] if sp
                       else per_rank[-1]["hidden_grad"])
        weight_grad = [row for r in per_rank for row in r["weight_grad"]]
        assert torch.allclose(torch.tensor(hidden_grad).double(), hidden.grad, atol=1e-5)
        assert torch.allclose(torch.tensor(weight_grad[:VOCABULARY]).double(), weight.grad, atol=1e-5)
        assert not any(map(any, weight_grad[VOCABULARY:])), "no gradient reaches padding"


def weighted(layout: dict[str, Any], chunk_tokens: int) -> dict[str, Any]:
    """Return two weighted sums in float64, and this process's parts of the gradient of
    ``first / 7 + 3 * second``, with their places."""

    import torch
    from megatron.core import parallel_state

    from megatron_sov.engine.model.logprobs import Head
    from megatron_sov.engine.parallel import context, world
    from megatron_sov.model.config import ParallelConfig

    world.join(ParallelConfig(**layout))
    tp, sp = layout.get("tp", 1), layout.get("sp", False)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    hidden, weight, labels, upstream = whole()
    rows = -(-VOCABULARY // tp)
    padded = torch.cat([weight, 9 * hidden[:rows * tp - VOCABULARY]]).double()
    part = padded[tp_rank * rows:(tp_rank + 1) * rows].clone().requires_grad_()
    places = context.row_index(TOKENS, sp, hidden.device)
    local = hidden[places, None].double().requires_grad_()
    head = Head(part, head_config(sp), chunk_tokens, VOCABULARY)
    weights = {"first": upstream.abs(), "second": (upstream > 0).float()}
    sums, losses = head.cross_entropy(local, labels, weights)
    (sums["first"] / 7 + 3 * sums["second"]).backward()
    return {"sums": [float(sums[term]) for term in weights], "losses": losses.tolist(),
            "losses are constants": not losses.requires_grad,
            "places": places.tolist(), "first row": tp_rank * rows,
            "hidden_grad": local.grad[:, 0].tolist(), "weight_grad": part.grad.tolist()}


@pytest.mark.distributed
def test_weighted_sums_have_the_gradients_of_whole_logits(ranks, job) -> None:
    import torch

    cases = [(1, {}, 64), (1, {}, 5), (2, {"tp": 2}, 5), (2, {"tp": 2, "sp": True}, 12), (2, {"cp": 2}, 4),
             (3, {"tp": 3, "sp": True}, 5), (4, {"tp": 2, "sp": True, "cp": 2}, 4)]
    results = ranks(*(job(__file__, "weighted", n, {"layout": layout, "chunk_tokens": c})
                      for n, layout, c in cases))
    hidden, weight, labels, upstream = (t.double() if t.is_floating_point() else t for t in whole())
    hidden.requires_grad_()
    weight.requires_grad_()
    losses = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    sums = [(losses * upstream.abs()).sum(), losses[upstream > 0].sum()]
    (sums[0] / 7 + 3 * sums[1]).backward()
    expected = [s.item() for s in sums]
    for (_, layout, _), per_rank in zip(cases, results, strict=True):
        hidden_grad, weight_grad = torch.zeros_like(hidden), torch.zeros(VOCABULARY + 2, HIDDEN).double()
        for result in per_rank:
            torch.testing.assert_close(result["sums"], expected, rtol=1e-12, atol=0)
            torch.testing.assert_close(torch.tensor(result["losses"]).double(), losses.detach())
            assert result["losses are constants"]
            hidden_grad[result["places"]] = torch.tensor(result["hidden_grad"], dtype=torch.float64)
            part = torch.tensor(result["weight_grad"], dtype=torch.float64)
            weight_grad[result["first row"]:result["first row"] + len(part)] += part
        torch.testing.assert_close(hidden_grad, hidden.grad, rtol=1e-11, atol=1e-13, msg=str(layout))
        torch.testing.assert_close(weight_grad[:VOCABULARY], weight.grad, rtol=1e-11, atol=1e-13,
                                   msg=str(layout))
        assert not weight_grad[VOCABULARY:].any(), "no gradient reaches padding"


def tempered(layout: dict[str, Any], every: int) -> dict[str, Any]:
    """Return log-probabilities at temperature 0.7 in float64 of every n-th position (0: of none), and this
    process's rows of their gradient."""

    from megatron.core import parallel_state

    from megatron_sov.engine.model.logprobs import Head
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import ParallelConfig

    world.join(ParallelConfig(**layout))
    import torch

    hidden, weight, labels, upstream = whole()
    part = weight.double().chunk(layout["tp"])[parallel_state.get_tensor_model_parallel_rank()].clone()
    head = Head(part.requires_grad_(), head_config(), 5, VOCABULARY)
    states = hidden[:, None].double().requires_grad_()
    logprobs = head.logprobs(states, labels, 0.7, None if every == 1 else torch.tensor(_is_asked(every)))
    (logprobs * upstream).sum().backward()
    assert part.grad is not None and states.grad is not None
    return {"logprobs": logprobs.tolist(), "hidden": states.grad[:, 0].tolist(), "weight": part.grad.tolist()}


def _is_asked(every: int) -> list[bool]:
    return [every > 0 and i % every == 0 for i in range(TOKENS)]


@pytest.mark.distributed
@pytest.mark.parametrize("every", [1, 3, 0])
def test_log_probabilities_are_of_the_policy_at_its_temperature(ranks, job, every: int) -> None:
    import torch

    hidden, weight, labels, upstream = (t.double() if t.is_floating_point() else t for t in whole())
    hidden.requires_grad_()
    weight.requires_grad_()
    expected = (hidden @ weight.T / 0.7).log_softmax(-1)[torch.arange(TOKENS), labels]
    expected = expected * torch.tensor(_is_asked(every))
    (expected * upstream).sum().backward()
    for per_rank in ranks(*(job(__file__, "tempered", tp, {"layout": {"tp": tp}, "every": every})
                            for tp in (1, 2))):
        found = {"logprobs": per_rank[0]["logprobs"], "hidden": per_rank[0]["hidden"],
                 "weight": [row for r in per_rank for row in r["weight"]]}
        for name, wanted in (("logprobs", expected), ("hidden", hidden.grad), ("weight", weight.grad)):
            torch.testing.assert_close(torch.tensor(found[name], dtype=torch.float64), wanted.detach(),
                                       rtol=1e-12, atol=1e-13)
