"""Settings: they survive JSON, list every problem at once, and `--set` knows types and neighbours."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sov import config as config_module
from megatron_sov.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    TrainConfig,
    YarnConfig,
    apply_settings,
    from_dict,
)
from megatron_sov.errors import UserError


def small(**model: Any) -> RunConfig:
    """Return a sound config of a small mixture-of-experts model."""
    shape = {"family": "solar_open", "vocab_size": 512, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
             "head_dim": 16, "num_experts": 8, "num_experts_per_token": 2, "expert_ffn_dim": 32} | model
    return RunConfig(recipe="small", model=ModelConfig(**shape), train=TrainConfig(steps=10, global_batch_size=8),
                     data=DataConfig(phases=(PhaseConfig("main", seq_len=128),)))


finite = st.floats(allow_nan=False, allow_infinity=False)
count = st.integers(min_value=0, max_value=2**40)
phases = st.lists(st.builds(PhaseConfig, name=st.text(max_size=8), share=finite, seq_len=count,
                            blend=st.dictionaries(st.text(max_size=8), finite, max_size=3)), max_size=3).map(tuple)
run_configs = st.builds(
    RunConfig,
    recipe=st.text(max_size=8),
    model=st.builds(ModelConfig, family=st.text(max_size=8), vocab_size=count, hidden_size=count, num_layers=count,
                    num_heads=count, num_kv_heads=count, head_dim=count, rope_theta=finite,
                    attention_pattern=st.text("LG", max_size=4),
                    yarn=st.none() | st.builds(YarnConfig, factor=finite, original_max_position_tokens=count)),
    parallel=st.builds(ParallelConfig, tp=count, sp=st.booleans(), ep=count),
    data=st.builds(DataConfig, phases=phases, packing=st.sampled_from(["concat", "whole"])),
    optim=st.builds(OptimConfig, lr=finite, schedule=st.sampled_from(["cosine", "wsd", "constant"])),
    train=st.builds(TrainConfig, steps=count, tokens=count, precision=st.sampled_from(["fp32", "bf16"])),
    objective=st.builds(ObjectiveConfig, name=st.sampled_from(["lm", "sft"]), text_coeff=finite),
)


@given(run_configs)
def test_a_config_reads_back_equal_from_its_json(config: RunConfig) -> None:
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def config_classes() -> list[type]:
    return [c for _, c in inspect.getmembers(config_module, inspect.isclass) if dataclasses.is_dataclass(c)]


@pytest.mark.parametrize("cls", config_classes(), ids=lambda c: c.__name__)
def test_settings_are_frozen_and_every_field_is_explained(cls: type) -> None:
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    explained = {field.target.id for field, text in itertools.pairwise(body)
                 if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)}
    assert {f.name for f in dataclasses.fields(cls)} == explained


def test_a_sound_config_has_no_problems() -> None:
    config = small()
    assert config.problems() == []
    config.check()


def test_every_problem_is_listed_at_once_with_field_value_and_rule() -> None:
    config = small(num_heads=4, num_kv_heads=3, head_dim=15, attention_pattern="LX", num_experts_per_token=9, init_std=0.0)
    config = replace(config, optim=OptimConfig(lr=-1.0), train=TrainConfig(global_batch_size=0), data=DataConfig(
        phases=(PhaseConfig("a", share=0.0, seq_len=1, blend={"en": -1.0}),)))
    with pytest.raises(UserError) as e:
        config.check()
    head, *lines = str(e.value).splitlines()
    assert head == f"recipe small: {len(lines)} problems"
    for start in (
        "model.num_kv_heads = 3", "model.head_dim = 15", "model.attention_pattern = 'LX'", "model.sliding_window_tokens = 0",
        "model.num_experts_per_token = 9", "model.init_std = 0.0", "data.phases.0 (a).share = 0.0",
        "data.phases.0 (a).seq_len = 1", "data.phases.0 (a).blend.en = -1.0", "data.phases.0 (a).blend has only zero",
        "train.steps = 0 needs a token budget", "train.global_batch_size = 0", "optim.lr = -1.0",
    ):
        assert any(line.strip().startswith(start) for line in lines), start


@pytest.mark.parametrize(("model", "sentence"), [
    ({"vocab_size": 0}, "model.vocab_size = 0 must be positive"),
    ({"num_dense_layers": 5, "dense_ffn_dim": 1}, "model.num_dense_layers = 5 must lie between 0 and num_layers = 4"),
    ({"num_dense_layers": 1}, "model.dense_ffn_dim = 0 must be positive"),
    ({"num_mtp_layers": 2, "dense_ffn_dim": 1}, "model.num_mtp_layers = 2 must be 0 or 1"),
    ({"attention_pattern": "LG"}, "model.sliding_window_tokens = 0 must be positive"),
    ({"sliding_window_tokens": 8}, "model.sliding_window_tokens = 8 must be positive exactly when"),
])
def test_rules_of_the_architecture(model: dict[str, Any], sentence: str) -> None:
    (problem,) = small(**model).problems()
    assert problem.startswith(sentence)


@pytest.mark.parametrize(("parallel", "num_ranks", "sentence"), [
    ({"tp": 0}, 1, "parallel.tp = 0 must be at least 1"),
    ({"tp": 4, "sp": True}, 4, "parallel.tp = 4 must divide model.num_kv_heads = 2; use one of 1, 2"),
    ({"tp": 2}, 2, "parallel.sp = False must be true"),
    ({"sp": True}, 1, "parallel.sp = True needs parallel.tp > 1"),
    ({"pp": 3}, 3, "parallel.pp = 3 must divide model.num_layers = 4; use one of 1, 2, 4"),
    ({"ep": 3}, 3, "parallel.ep = 3 must divide model.num_experts = 8"),
    ({"etp": 5}, 5, "parallel.etp = 5 must divide model.expert_ffn_dim = 32"),
    ({"ep": 2}, 3, "parallel etp 1 x ep 2 x pp 1 = 2 must divide the number of processes, 3"),
])
def test_rules_of_the_layout(parallel: dict[str, Any], num_ranks: int, sentence: str) -> None:
    (problem,) = replace(small(), parallel=ParallelConfig(**parallel)).problems(num_ranks)
    assert problem.startswith(sentence)


def test_the_batch_must_split_over_the_data_parallel_ranks() -> None:
    assert small().problems(num_ranks=4) == []
    (problem,) = small().problems(num_ranks=3)
    assert problem == ("train.global_batch_size = 8 must be a multiple of micro_batch_size 1 x data parallel size 3 = 3")


@pytest.mark.parametrize(("setting", "path", "value"), [
    ("train.steps=100", ("train", "steps"), 100),
    ("optim.lr=1e-4", ("optim", "lr"), 1e-4),
    ("optim.lr=1", ("optim", "lr"), 1.0),
    ("parallel.sp=true", ("parallel", "sp"), True),
    ("train.recompute=False", ("train", "recompute"), False),
    ("model.attention_pattern=LG", ("model", "attention_pattern"), "LG"),
    ("model.yarn=null", ("model", "yarn"), None),
    ("model.yarn.factor=8", ("model", "yarn", "factor"), 8.0),
    ("data.phases.0.seq_len=512", ("data", "phases", 0, "seq_len"), 512),
    ('data.phases.0.blend={"en": 2, "ko": 1}', ("data", "phases", 0, "blend"), {"en": 2.0, "ko": 1.0}),
    ("data.phases.0.blend.ko=3", ("data", "phases", 0, "blend", "ko"), 3.0),
    ("needle.depths=[0, 0.5]", ("needle", "depths"), (0.0, 0.5)),
    ("obs.wandb_project=my run = 2", ("obs", "wandb_project"), "my run = 2"),
])
def test_set_converts_to_the_type_of_the_field(setting: str, path: tuple[str | int, ...], value: object) -> None:
    node: Any = apply_settings(small(), [setting])
    for part in path:
        node = node[part] if isinstance(node, (dict, tuple)) else getattr(node, str(part))
    assert (node, type(node)) == (value, type(value))


def test_later_settings_win_and_the_given_config_stays_as_it_was() -> None:
    config = small()
    assert apply_settings(config, ["train.steps=1", "train.steps=2"]).train.steps == 2
    assert config.train.steps == 10


@pytest.mark.parametrize(("setting", "message"), [
    ("train.step=1", "'train.step' does not exist; did you mean 'steps'?"),
    ("trian.steps=1", "'trian' does not exist; did you mean 'train'?"),
    ("train.steps", "must have the form key=value"),
    ("=1", "must have the form key=value"),
    ("data.phases.3.seq_len=1", "data.phases has items 0 to 0, not '3'"),
    ("data.phases.0.seqlen=1", "'data.phases.0.seqlen' does not exist; did you mean 'seq_len'?"),
    ("model.yarn.factr=1", "'model.yarn.factr' does not exist; did you mean 'factor'?"),
    ("train.steps.x=1", "'train.steps' is a value and has no fields"),
    ("train.steps=many", "train.steps = 'many'"),
    ("train.steps=1.5", "train.steps = 1.5"),
    ("train.precision=fp16", "train.precision = 'fp16'"),
])
def test_a_wrong_setting_is_refused_with_its_key_and_the_nearest_one(setting: str, message: str) -> None:
    with pytest.raises(UserError) as e:
        apply_settings(small(), [setting])
    assert message in str(e.value)


def test_unknown_fields_and_wrong_types_of_a_file_are_all_named() -> None:
    raw = small().to_dict()
    raw["train"] |= {"stepz": 3, "micro_batch_size": "two"}
    raw["model"] |= {"num_expert": 4}
    with pytest.raises(UserError) as e:
        from_dict(raw)
    text = str(e.value)
    assert text.startswith("config: 3 problems")
    assert "train.stepz: no such setting; did you mean 'steps'?" in text
    assert "model.num_expert: no such setting; did you mean 'num_experts'?" in text
    assert "train.micro_batch_size = 'two'" in text


def test_steps_follow_from_the_token_budget_and_the_mean_sample_length() -> None:
    """3/4 of the steps at 100 tokens and 1/4 at 200: 125 tokens a sample, 8 samples a step, so 10,000 tokens are 10 steps."""
    config = replace(small(), train=TrainConfig(tokens=10_000, global_batch_size=8),
                     data=DataConfig(phases=(PhaseConfig("a", share=3, seq_len=100), PhaseConfig("b", share=1, seq_len=200))))
    assert config.num_steps() == 10
    assert replace(config, train=TrainConfig(steps=7)).num_steps() == 7
