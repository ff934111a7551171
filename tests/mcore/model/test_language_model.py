"""The whole model: documents of a row do not see each other, at any layout, and positions restart."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny import tiny_model

SMALL = ["model.init_std=0.3", "model.seq_aux_loss_coeff=0"]
DOCUMENT = [(7 * i + 3) % 96 for i in range(41)]  # longer than the window of 32
BEFORE = [[(5 * i + 1) % 96 for i in range(n)] for n in (1, 38)]


def hidden(recipe: str, layout: dict[str, Any], documents: list[list[int]]) -> list[list[float]] | None:
    """Return the hidden states of the last document of a row, trunk then prediction depths (None
    before the last stage)."""
    import torch

    from megatron_sov import recipes
    from megatron_sov.config import ParallelConfig, apply_settings
    from megatron_sov.mcore.decode.forward_only import ForwardModel, Inputs
    from megatron_sov.mcore.model import init
    from megatron_sov.mcore.model.language_model import build, gather_sequence
    from megatron_sov.mcore.parallel import context, world

    config = apply_settings(recipes.get(recipe), SMALL)
    place = world.join(ParallelConfig(**layout))
    model = build(config.model, ParallelConfig(**layout), config.train)
    init.initialise(model, config.model, 1)
    row = Inputs(documents, torch.device("cpu"))
    first, last = (int(row.inputs.cu_seqlens[len(documents) - 1]), int(row.inputs.cu_seqlens[len(documents)]))
    found = ForwardModel(model, 64).map([row], lambda depths, *_: [
        context.gather(gather_sequence(d, model.config))[first:last] for d in depths])
    if not place.last_stage:
        return None
    trunk, *depths = found[0]
    # a depth's last place sees what follows, and is never learned
    return torch.cat([trunk, *(d[:-1] for d in depths)]).tolist()


@pytest.mark.distributed
def test_a_document_is_the_same_alone_and_behind_others(ranks, job) -> None:
    cases = [(recipe, *case) for recipe in ("tiny-k-exaone", "tiny-solar-open")
             for case in [(1, {}, [DOCUMENT]), (1, {}, [*BEFORE, DOCUMENT]),
                          (2, {"tp": 2, "sp": True}, [*BEFORE, DOCUMENT]),
                          (2, {"pp": 2}, [*BEFORE, DOCUMENT]), (2, {"pp": 2, "vpp": 2}, [*BEFORE, DOCUMENT]),
                          (2, {"cp": 2}, [*BEFORE, DOCUMENT])]]
    results = ranks(*(job(__file__, "hidden", n, {"recipe": recipe, "layout": x, "documents": d})
                      for recipe, n, x, d in cases))
    for (recipe, _, layout, documents), per_rank in zip(cases, results, strict=True):
        states = [[x for row in s for x in row] for s in per_rank if s is not None]
        assert len(states) == (1 if "pp" in layout else len(per_rank))
        if documents == [DOCUMENT]:
            alone = states[0]
            assert max(map(abs, alone)) > 0.5
        for state in states:
            assert state == pytest.approx(alone, abs=5e-5), (recipe, layout)


def leak(recipe: str, layout: dict[str, Any]) -> dict[str, float]:
    """Return the largest gradient of one document's log-probabilities at the embeddings of that document,
    and of the others."""
    import torch

    from megatron_sov.mcore.decode.forward_only import Inputs, split_depths
    from megatron_sov.mcore.model.logprobs import head_of
    from megatron_sov.mcore.parallel import context

    config, model = tiny_model(recipe, *SMALL, layout=layout)
    row = Inputs([BEFORE[1], DOCUMENT, BEFORE[1]], torch.device("cpu"), min_tokens=125).inputs
    chunk, embedded = model.chunks[0], []

    def keep(module: Any, arguments: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    chunk.embedding.register_forward_hook(keep)
    labels = torch.arange(len(row.tokens)) % 96
    total = sum(head_of(model, 64).logprobs(states, labels)[38:79].sum()
                for states in split_depths(chunk(row), config.model.num_mtp_layers))
    total.backward()
    index = context.row_index(len(labels), model.config.sequence_parallel, labels.device)
    inside = (index >= 38) & (index < 79)
    gradients = torch.stack([e.grad[:, 0].abs().amax(dim=1) for e in embedded]).amax(dim=0)
    return {"own": float((gradients * inside).max()), "others": float((gradients * ~inside).max()),
            "calls": len(embedded)}


@pytest.mark.distributed
def test_no_gradient_reaches_another_document(ranks, job) -> None:
    cases = [(recipe, n, x) for recipe in ("tiny-k-exaone", "tiny-solar-open")
             for n, x in ((1, {}), (2, {"cp": 2}), (4, {"cp": 2, "tp": 2, "sp": True}))]
    results = ranks(*(job(__file__, "leak", n, {"recipe": recipe, "layout": x}) for recipe, n, x in cases))
    for case, per_rank in zip(cases, results, strict=True):
        assert [r["others"] for r in per_rank] == [0.0] * len(per_rank), case
        assert max(r["own"] for r in per_rank) > 0.01, case
        assert {r["calls"] for r in per_rank} == {2 if case[0] == "tiny-k-exaone" else 1}, (
            "the prediction layer embeds as well")
