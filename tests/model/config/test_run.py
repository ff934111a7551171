"""Run settings: frozen, documented, all problems in one list, and steps from the token budget."""

import ast
import dataclasses
import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_sov.base.settings import SettingsProblem
from megatron_sov.model import config as config_module
from megatron_sov.model.config import DataConfig, ParallelConfig, PhaseConfig, RunConfig

Small = Callable[..., RunConfig]


@pytest.mark.each("cls", [cls for _, cls in inspect.getmembers(config_module, inspect.isclass)
                          if dataclasses.is_dataclass(cls)])
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


def test_a_row_must_split_over_the_processes_that_share_it(small: Small) -> None:
    """A micro-batch is one row of whole samples, so the limit is sample length times number of samples."""
    layout = ParallelConfig(tp=2, sp=True, cp=2)

    def problems(seq_len: int, micro_batch_size: int) -> list[SettingsProblem]:
        config = small()
        return replace(config, parallel=layout, data=DataConfig(phases=(PhaseConfig("a", seq_len=seq_len),)),
                       train=replace(config.train, micro_batch_size=micro_batch_size)).problems(num_ranks=4)

    assert problems(128, 1) == problems(12, 2) == []
    (problem,) = problems(12, 1)
    assert problem.key == "data.phases.0.seq_len" and "2 x parallel.cp 2 x parallel.tp 2 = 8" in problem.rule
    layout = ParallelConfig(tp=2, sp=True)
    assert problems(13, 2) == []
    (problem,) = problems(13, 1)
    assert problem.rule.endswith("must be a multiple of parallel.tp = 2")


def test_context_parallel_processes_share_a_batch(small: Small) -> None:
    for num_ranks, cp in ((8, 1), (16, 2), (16, 4)):
        assert replace(small(), parallel=ParallelConfig(cp=cp)).problems(num_ranks) == []
