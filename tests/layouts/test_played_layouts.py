"""Layouts, families and objectives whose only question is whether they give one process' answer: played in
this process (docs/plan.md).  Messages between real processes are tried by test_agreement.py and
test_layouts_agree.py."""

from __future__ import annotations

import importlib

import pytest

from megatron_sov.engine.parallel import cpu_shims
from megatron_sov.model import recipes
from megatron_sov.model.config import apply_settings
from tests.layouts import test_agreement

cpu_shims.prepare_without_gpu()
proving = importlib.import_module("megatron_sov.proof.proving")  # which imports megatron-core
TP2 = ("parallel.tp=2", "parallel.sp=true")
STAGES = (*TP2, "parallel.pp=2", "parallel.ep=2")
OVERLAPPED = ("parallel.zero1=true", "parallel.overlap_grad_reduce=true",
              "parallel.overlap_param_gather=true", "parallel.bucket_params=900")
"""Buckets of 900 parameters: several of them even in these models, so that an unfinished one can be read too
early."""
CONTEXT = ("parallel.cp=2", "parallel.ep=2", *OVERLAPPED)
EVERYTHING = (*STAGES, "parallel.cp=2")
SFT = ("objective.name=sft", "objective.text_coeff=0.3", "objective.loss_per=turn")
GLM = (*SFT, "model.num_expert_groups=2", "model.num_groups_per_token=1", "model.seq_aux_loss_coeff=0.01")
"""Experts in the prediction layer, chosen within groups."""
CASES = {
    "glm4_moe, stages": ("tiny-glm4-moe", (*GLM, *STAGES), 4),
    "glm4_moe, context": ("tiny-glm4-moe", (*GLM, *CONTEXT), 4),
    "qwen2, tied": ("tiny-qwen2", ("model.tied_embeddings=true", "parallel.tp=2"), 2),
    "qwen2, tied, interleaved": ("tiny-qwen2", (
        "model.tied_embeddings=true", "parallel.pp=2", "parallel.vpp=2", *OVERLAPPED), 4),
    "gpt_oss, stages": ("tiny-gpt-oss", STAGES, 4),
    "gpt_oss, context": ("tiny-gpt-oss", CONTEXT, 4),
    "deepseek_v3, stages": ("tiny-deepseek-v3", STAGES, 4),
    "deepseek_v3, context": ("tiny-deepseek-v3", CONTEXT, 4),
    "qwen3_moe, stages": ("tiny-qwen3-moe", STAGES, 4),
    "pairs, everything at once": ("tiny-k-exaone", (
        "objective.name=preference", "preference.chosen_coeff=0.25", *EVERYTHING), 8),
    "ratios of sequences, everything at once": ("tiny-solar-open-rl", (
        "policy.ratio=sequence", *EVERYTHING), 8)} | {
    f"{model}: {layout.name}": (
        test_agreement.MODELS[model][0],
        tuple(s for s in layout.settings if "micro_batch" not in s), layout.num_ranks)
    for model, count in test_agreement.REAL.items() for layout in test_agreement.chosen(model)[count:]}
"""What it is -> recipe, settings, processes."""


@pytest.mark.parametrize("case", CASES)
def test_a_layout_gives_the_answer_of_one_process(case: str) -> None:
    recipe, settings, num_ranks = CASES[case]
    config = apply_settings(recipes.get(recipe), [*settings, "train.global_batch_size=16",
                                                  "train.micro_batch_size=1"])

    small, verdict = proving.prove_run(config, num_ranks)

    assert (verdict.outcome, verdict.places) == (proving.EQUAL, [])
    assert verdict.largest < 1e-12 and verdict.messages > 0
    assert small.config.objective.name == config.objective.name
