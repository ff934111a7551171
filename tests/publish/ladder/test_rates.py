"""Rates by width: logits learn as much at any width, which one rate for all does not give."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.engine.optimizer.muon import update_scale
from megatron_sov.publish.ladder.family import mup_model, mup_optim, step_law_batch, step_law_optim, warmup

WIDTHS = (32, 128)
BASE = 32


def test_matrices_learn_at_base_width_over_width_and_decay_as_much() -> None:
    config = recipes.get("tiny-solar-open")
    optim = mup_optim(config.optim, config.model, 512)
    assert {g.lr_scale for g in optim.groups} == {4.0}
    assert {g.lr_scale * (g.weight_decay or 0) for g in optim.groups} == {config.optim.weight_decay}
    assert optim.lr == config.optim.lr and "*.word_embeddings.weight" not in {g.pattern for g in optim.groups}
    assert mup_model(config.model, 512).init_std == pytest.approx(2 * config.model.init_std)


def test_a_tied_head_learns_as_a_head() -> None:
    config = recipes.get("tiny-qwen2")
    patterns = {g.pattern for g in mup_optim(config.optim, config.model, 512).groups}
    assert "*.word_embeddings.weight" in patterns and "output_layer.weight" not in patterns
    assert "*.router.weight" not in patterns


@pytest.mark.parametrize("kind", ["match_rms_adamw", "original", "spectral"])
def test_outputs_change_as_much_by_muon_at_every_width(kind: Any) -> None:
    config = recipes.get("tiny-k-exaone")
    width, base, experts = config.model.hidden_size, 4 * config.model.hidden_size, config.model.num_experts
    optim = mup_optim(replace(config.optim, name="muon", muon_scale=kind), config.model, base)
    scales = {g.pattern: g.lr_scale for g in optim.groups}

    def change(rows: int, columns: int, lr: float) -> float:
        # inputs of 1, all along the direction that the update stretches most
        return lr * update_scale(kind, rows, columns) * math.sqrt(columns / rows)

    assert change(width, width, scales["*.linear_proj.weight"]) == pytest.approx(change(base, base, 1.0))
    assert change(experts, width, scales["*.router.weight"]) == pytest.approx(change(experts, base, 1.0))
    assert scales["output_layer.weight"] == 4.0, "AdamW's"


def test_the_fitted_rates_are_those_of_the_paper() -> None:
    # arXiv 2503.04715, section 3: 1 B parameters, 100 B tokens
    optim = step_law_optim(recipes.get("qwen3-8b").optim, 10**9, 10**11)
    assert optim.lr == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307) and 1e-3 < optim.lr < 2e-3
    assert step_law_batch(10**11, 2048) * 2048 == pytest.approx(0.58 * 1e11**0.571, rel=0.01)


def test_the_warmup_is_a_part_of_the_run() -> None:
    optim = recipes.get("solar-open-102b").optim
    assert (warmup(optim, 1000).warmup_steps, warmup(optim, 3).warmup_steps) == (50, 1)


def learned(data: str, root: str) -> dict[str, list[float]]:
    """Runs inside a rank: at each width, how much the logits of held text change in a few steps (root mean
    square), with rates by width and with one rate for all."""
    import torch

    from megatron_sov.engine.decode.forward_only import Inputs
    from megatron_sov.engine.parallel import world
    from megatron_sov.model.config import apply_settings
    from megatron_sov.publish.ladder.family import scaled
    from megatron_sov.runs.folder import RunFolder
    from megatron_sov.train.data.token_shards import open_sources
    from megatron_sov.train.objectives.data_objective import LanguageModelling
    from megatron_sov.train.trainer import Trainer

    base = apply_settings(recipes.get("tiny-solar-open"), [
        "model.vocab_size=368", f"model.hidden_size={BASE}", "model.num_heads=2", "model.head_dim=16",
        "model.num_kv_heads=1", "model.expert_ffn_dim=32", "model.num_experts=4", "optim.lr=4e-3",
        "optim.warmup_steps=1", 'data.phases=[{"name": "main", "seq_len": 32}]', "train.global_batch_size=4",
        "train.micro_batch_size=4", "train.steps=3", "guards.hang_timeout_s=0"])
    found: dict[str, list[float]] = {"mup": [], "one": []}
    place = world.join(base.parallel)
    for rates in found:
        for width in WIDTHS:
            config = replace(base, model=scaled(base.model, width, 2, 16))
            if rates == "mup":
                model = mup_model(config.model, BASE)
                config = replace(config, model=model, optim=mup_optim(config.optim, model, BASE))
            config.check()
            folder = RunFolder(Path(root) / f"{rates}-{width}")
            trainer = Trainer(config, place, folder, open_sources({data: 1.0}, 368), LanguageModelling)
            held = Inputs([list(range(5, 37))], torch.device("cpu"))
            positions = torch.arange(32)
            before = trainer.policy.logits(held, positions)
            for _ in range(3):
                trainer.update()
            change = trainer.policy.logits(held, positions) - before
            found[rates].append(float(change.square().mean().sqrt()))
            trainer.close()
    world.leave()
    return found


def test_the_coordinate_check(ranks: Any, job: Any, packed_data: Any, tmp_path: Path) -> None:
    ((found,),) = ranks(job(__file__, "learned", 1, {"data": str(packed_data.text), "root": str(tmp_path)}))
    growth = {rates: values[-1] / values[0] for rates, values in found.items()}
    assert growth["one"] > 1.8, f"at one rate a model four times as wide learns more in a step: {found}"
    assert 0.6 < growth["mup"] < 1.5, f"by width it learns as much: {found}"
