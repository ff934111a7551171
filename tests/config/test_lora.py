"""Settings of low-rank adaptation: what they adapt in which model, and everything that is wrong at once."""

from __future__ import annotations

import pytest

from megatron_sov import recipes
from megatron_sov.config import RunConfig, apply_settings, from_dict
from megatron_sov.errors import UserError


def config(recipe: str, *settings: str) -> RunConfig:
    return apply_settings(recipes.get(recipe), ["lora.rank=4", *settings])


@pytest.mark.parametrize(("recipe", "extra"), [
    ("tiny-qwen3", {"gate_proj", "up_proj", "down_proj"}), ("tiny-qwen3-moe", {"experts"}),
    ("tiny-solar-open", {"gate_proj", "up_proj", "down_proj", "experts"})])
def test_all_linear_is_what_the_model_has_without_its_head(recipe: str, extra: set[str]) -> None:
    found = config(recipe)
    assert found.problems() == []
    assert found.lora.adapted(found.model) == {"q_proj", "k_proj", "v_proj", "o_proj", *extra}
    assert not apply_settings(found, ["lora.rank=0"]).lora.adapted(found.model)


@pytest.mark.parametrize(("recipe", "settings", "said"), [
    ("tiny-qwen3", ["lora.rank=-1"], "lora.rank = -1 must be 0 (off) or positive"),
    ("tiny-qwen3", ["lora.alpha=0"], "lora.alpha = 0.0 must be a positive number"),
    ("tiny-qwen3", ["lora.targets=[]"], "lora.targets names nothing to adapt"),
    ("tiny-qwen3", ['lora.targets=["gate"]'], "names 'gate', which is none of all-linear, q_proj"),
    ("tiny-qwen3", ['lora.targets=["experts"]'], "names experts, which this model lacks"),
    ("tiny-qwen3-moe", ['lora.targets=["up_proj"]'], "names up_proj, which this model lacks"),
    ("tiny-qwen2", ['lora.targets=["lm_head"]'], "lm_head, which is the embedding in this model"),
    ("tiny-qwen2", ['lora.targets=["embed_tokens"]'], "embed_tokens, which is the head in this model"),
    ("tiny-qwen3", ["lora.dora=true", 'lora.targets=["embed_tokens"]'], "not built for embed_tokens"),
    ("tiny-k-exaone", ['lora.targets=["embed_tokens"]', "parallel.pp=2"],
     "for the prediction layer, the last (parallel.pp = 2)"),
    ("tiny-gpt-oss", [], "lora.targets adapts experts, which is not built for experts with biases"),
    ("tiny-solar-open", ["lora.dora=true"], "lora.dora = True is not built for experts"),
    ("tiny-qwen3", ["lora.dora=true", 'lora.targets=["q_proj", "lm_head"]'], "not built for lm_head"),
    ("tiny-deepseek-v3", [], "adapts q_proj, k_proj, v_proj, o_proj, and adapters of latent attention"),
    ("tiny-qwen3", ["optim.name=muon"], "cannot be with optimizer muon"),
    ("tiny-qwen3", ["parallel.zero1=true", "parallel.overlap_grad_reduce=true",
                    "parallel.overlap_param_gather=true"], "parallel.overlap_param_gather; set it to false"),
    ("tiny-solar-open", ["gpu.shared_expert_overlap=on"], "gpu.shared_expert_overlap = on"),
    ("tiny-solar-open", ["train.recompute=false", 'gpu.offload_modules=["expert_fc1"]'],
     "gpu.offload_modules = expert_fc1 frees the memory of all; leave expert_fc1 out"),
])
def test_what_cannot_be_is_said_in_one_sentence(recipe: str, settings: list[str], said: str) -> None:
    problems = [p for p in config(recipe, *settings).problems() if p.startswith("lora.")]
    assert len(problems) == 1 and said in problems[0]


def test_several_mistakes_are_told_together() -> None:
    with pytest.raises(UserError, match=r"(?s)lora\.alpha.*names 'x'.*muon"):
        config("tiny-qwen3", "lora.alpha=-1", 'lora.targets=["x"]', "optim.name=muon").check()


def test_settings_come_back_from_json() -> None:
    found = config("tiny-solar-open", 'lora.targets=["q_proj", "experts"]')
    assert from_dict(found.to_dict()) == found
