"""Work runs equally on every engine."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.infer.engine import check_engine, run_with_engine
from megatron_sov.infer.engines.target import find_target
from megatron_sov.infer.request import TRANSFORMERS, Sampling

PROMPTS = [[5, 9, 2, 70], [300], [8, 8, 8, 8]]


def test_precision_setting_is_equal_for_both_engines(hf_models: dict[str, Path]) -> None:
    target = find_target(hf_models["solar_open"])

    def logprobs(*settings: str) -> Any:
        return run_with_engine(TRANSFORMERS, target, lambda engine: engine.generate(
            PROMPTS, Sampling(4)).logprobs, longest=16, settings=settings)

    check_engine(TRANSFORMERS, target, ["train.precision=bf16"], None)
    assert logprobs() == logprobs("train.precision=fp32") != logprobs("train.precision=bf16")
    with pytest.raises(UserError, match=r"fp32, bf16, fp64$"):
        logprobs("train.precision=fp8")
    with pytest.raises(UserError, match=r"^--set parallel\.tp=2:"):
        check_engine(TRANSFORMERS, target, ["train.precision=bf16", "parallel.tp=2"], None)
