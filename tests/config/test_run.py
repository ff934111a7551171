"""A run's settings: frozen, explained, every problem listed at once, steps from the token budget."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_sov import config as config_module
from megatron_sov.config import (
    DataConfig,
    NeedleConfig,
    OptimConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    TrainConfig,
    apply_settings,
)
from megatron_sov.errors import UserError

Small = Callable[..., RunConfig]


def config_classes() -> list[type]:
    return [c for _, c in inspect.getmembers(config_module, inspect.isclass) if dataclasses.is_dataclass(c)]


@pytest.mark.parametrize("cls", config_classes(), ids=lambda c: c.__name__)
def test_settings_are_frozen_and_every_field_is_explained(cls: type) -> None:
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    explained = {field.target.id for field, text in itertools.pairwise(body)
                 if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
                 and isinstance(text.value, ast.Constant)}
    assert {f.name for f in dataclasses.fields(cls)} == explained


def test_a_sound_config_has_no_problems(small: Small) -> None:
    config = small()
    assert config.problems() == []
    config.check()


def test_every_problem_is_listed_at_once_with_field_value_and_rule(small: Small) -> None:
    config = small(num_heads=4, num_kv_heads=3, head_dim=15, attention_pattern="LX", num_experts_per_token=9,
                   init_std=0.0)
    config = replace(config, optim=OptimConfig(lr=-1.0), train=TrainConfig(global_batch_size=0),
                     data=DataConfig(
                         phases=(PhaseConfig("a", share=0.0, seq_len=1, blend={"en": -1.0}),)))
    with pytest.raises(UserError) as e:
        config.check()
    head, *lines = str(e.value).splitlines()
    assert head == f"recipe small: {len(lines)} problems"
    for start in (
        "model.num_kv_heads = 3", "model.head_dim = 15", "model.attention_pattern = 'LX'",
        "model.sliding_window_tokens = 0", "model.num_experts_per_token = 9", "model.init_std = 0.0",
        "data.phases.0 (a).share = 0.0", "data.phases.0 (a).seq_len = 1", "data.phases.0 (a).blend.en = -1.0",
        "data.phases.0 (a).blend has only zero", "train.steps = 0 needs a token budget",
        "train.global_batch_size = 0", "optim.lr = -1.0",
    ):
        assert any(line.strip().startswith(start) for line in lines), start


@pytest.mark.parametrize("setting", [
    "train.steps=1e12", "train.global_batch_size=8e10", "train.ramp_steps=1e15", "train.num_threads=1e9",
    "data.prefetch_steps=1e9", "model.num_layers=1e12", "model.max_position_tokens=1e13",
    "data.phases.0.seq_len=1e12", "data.phases.0.global_batch_size=1e9", "data.phases.0.tokens=1e18",
])
def test_a_slip_of_some_zeros_is_refused(setting: str, small: Small) -> None:
    key, _, value = setting.partition("=")
    (problem, *_) = [p for p in apply_settings(small(), [setting]).problems() if "count its zeros" in p]
    where = key.replace("phases.0", "phases.0 (main)")
    assert problem.startswith(f"{where} = {int(float(value))} must be at most ")


def test_a_token_budget_that_makes_too_many_steps_is_refused(small: Small) -> None:
    (problem,) = replace(small(), train=TrainConfig(tokens=10**15, global_batch_size=8)).problems()
    assert problem.startswith("the token budgets make 976,562,500,000 steps, which must be at most")


def test_a_negative_number_of_steps_is_one_problem(small: Small) -> None:
    assert replace(small(), train=TrainConfig(steps=-5, global_batch_size=8)).problems() == [
        "train.steps = -5 must not be negative"]


def test_a_row_must_split_over_the_processes_that_share_it(small: Small) -> None:
    """A row is a micro-batch of whole samples: their length times their number counts."""
    layout = ParallelConfig(tp=2, sp=True, cp=2)

    def problems(seq_len: int, micro_batch_size: int) -> list[str]:
        config = small()
        return replace(config, parallel=layout, data=DataConfig(phases=(PhaseConfig("a", seq_len=seq_len),)),
                       train=replace(config.train, micro_batch_size=micro_batch_size)).problems(num_ranks=4)

    assert problems(128, 1) == problems(12, 2) == []
    assert problems(12, 1) == ["data.phases.0 (a).seq_len = 12 x train.micro_batch_size 1 = 12, the tokens "
                               "of a row, must be a multiple of 2 x parallel.cp 2 x parallel.tp 2 = 8"]
    layout = ParallelConfig(tp=2, sp=True)
    assert problems(13, 2) == []
    (problem,) = problems(13, 1)
    assert problem.endswith("must be a multiple of parallel.tp = 2")


def test_processes_that_share_a_row_need_no_batch_of_their_own(small: Small) -> None:
    for num_ranks, cp in ((8, 1), (16, 2), (16, 4)):
        assert replace(small(), parallel=ParallelConfig(cp=cp)).problems(num_ranks) == []
    (problem,) = replace(small(), parallel=ParallelConfig(cp=2)).problems(32)
    assert "data parallel size 16" in problem


def test_the_batch_must_split_over_the_data_parallel_ranks(small: Small) -> None:
    assert small().problems(num_ranks=4) == []
    (problem,) = small().problems(num_ranks=3)
    assert problem == ("global_batch_size = 8 (phase main) must be a multiple of "
                       "train.micro_batch_size 1 x data parallel size 3 = 3")


def test_needle_documents_need_sound_numbers(small: Small) -> None:
    needle = NeedleConfig(train_share=1.0, train_needles=-1, train_questions=0, answer_weight=0,
                          text_weight=-0.5)
    assert replace(small(), needle=needle).problems() == [
        "needle.train_share = 1.0: must lie in [0, 1)", "needle.train_needles = -1 must not be negative",
        "needle.train_questions = 0 must be positive", "needle.answer_weight = 0 must be positive",
        "needle.text_weight = -0.5 must not be negative"]


def test_steps_follow_from_the_token_budget_unless_they_are_given(small: Small) -> None:
    """3/4 of the tokens at 100 tokens a sample and 1/4 at 200, 8 samples a step: 30 and 5 steps."""
    config = replace(small(), train=TrainConfig(tokens=32_000, global_batch_size=8), data=DataConfig(
        phases=(PhaseConfig("a", share=3, seq_len=100), PhaseConfig("b", share=1, seq_len=200))))
    assert (config.num_steps(), config.phase_starts()) == (35, [0, 30])
    assert replace(config, train=TrainConfig(steps=8)).num_steps() == 8
