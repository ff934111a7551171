"""Requirements of `train.fp8` on precision, model, layout and rows: one message for each rule."""

from dataclasses import replace

import pytest

from megatron_sov import recipes
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.model.config.gpu import fp8_format

SOUND = ["train.precision=bf16", "data.phases.0.seq_len=128", "train.micro_batch_size=1"]


def tiny(*changes: str, recipe: str = "tiny-k-exaone") -> RunConfig:
    return apply_settings(recipes.get(recipe), [*SOUND, *changes])


@pytest.mark.each("recipe", ["tiny-k-exaone", "tiny-solar-open"])
@pytest.mark.each("fp8", ["tensorwise", "blockwise", "mxfp8", "nvfp4"])
def test_the_tiny_recipes_take_every_recipe(recipe: str, fp8: str) -> None:
    assert tiny(f"train.fp8={fp8}", recipe=recipe).problems() == []


@pytest.mark.each("recipe", ["solar-open-102b", "k-exaone-236b"])
@pytest.mark.each("fp8", ["tensorwise", "blockwise", "mxfp8", "nvfp4"])
def test_the_big_recipes_take_every_recipe(recipe: str, fp8: str) -> None:
    config = recipes.get(recipe)
    changed = replace(config, train=replace(config.train, fp8=fp8, tokens=10**9))
    assert not [p for p in changed.problems(8192) if "fp8" in p.key]


BROKEN = {
    "delayed": (["train.fp8=delayed"], "checkpoints do not store"),
    "precision": (["train.fp8=tensorwise", "train.precision=fp32"], "needs train.precision = bf16, not fp32"),
    "weights without fp8": (["train.fp8_weights=true", "parallel.zero1=true"], "train.fp8 = none"),
    "no layer left": (["train.fp8=mxfp8", "train.fp8_bf16_layers_at_start=3",
                       "train.fp8_bf16_layers_at_end=1"], "cover all 4 layers"),
    "padding": (["train.fp8=mxfp8", "train.fp8_pad_routed_tokens=true",
                 "parallel.expert_dispatcher=allgather"], "use alltoall or leave it out"),
    "rows": (["train.fp8=tensorwise", "data.phases.0.seq_len=40"],
             "x train.micro_batch_size 1 = 40 tokens on each process; train.fp8 = "
             "tensorwise needs a multiple of 16"),
    "rows cut": (["train.fp8=mxfp8", "data.phases.0.seq_len=96", "parallel.tp=2", "parallel.sp=true"],
                 "/ parallel.tp 2 (parallel.sp) = 48 tokens on each process"),
    "rows of nvfp4": (["train.fp8=nvfp4", "data.phases.0.seq_len=192"], "a multiple of 128"),
    "hidden": (["train.fp8=mxfp8", "model.hidden_size=144"],
               "needs a multiple of 32, and model.hidden_size = 144"),
    "experts": (["train.fp8=mxfp8", "parallel.etp=8"], "/ parallel.etp 8 = 16"),
    "heads": (["train.fp8=tensorwise", "model.head_dim=6"], "x model.head_dim 6 = "),
    "dense": (["train.fp8=tensorwise", "model.dense_ffn_dim=200"], "model.dense_ffn_dim 200 = 200"),
}


@pytest.mark.each(("changes", "message"), BROKEN.values())
def test_every_broken_rule_is_reported(changes: list[str], message: str) -> None:
    result = tiny(*changes).problems(8)
    assert [p for p in result if message in p.sentence], result


def test_a_wide_dense_layer_that_stays_in_bf16_may_have_any_width() -> None:
    odd = ["train.fp8=nvfp4", "model.dense_ffn_dim=200"]
    assert tiny(*odd).problems()
    assert tiny(*odd, "train.fp8_bf16_layers_at_start=1").problems() == []


@pytest.mark.parametrize("stages", ["[3, 1]", "[]"])
def test_layers_that_stay_in_bf16_may_fill_a_pipeline_stage_and_more(stages: str) -> None:
    assert tiny("train.fp8=mxfp8", "train.fp8_bf16_layers_at_start=3", "parallel.pp=2",
                f"parallel.pipeline_layout={stages}").problems(2) == []


def test_the_format_follows_the_recipe() -> None:
    formats = {fp8: fp8_format(tiny(f"train.fp8={fp8}").train)
               for fp8 in ("tensorwise", "blockwise", "mxfp8")}
    assert formats == {"tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
    assert fp8_format(tiny("train.fp8=tensorwise", "train.fp8_format=e4m3").train) == "e4m3"
