"""One piece of work, whichever engine does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov.infer.engine import MEGATRON, TRANSFORMERS, Engine, run_engine  # noqa: E402
from megatron_sov.infer.engines.target import find_target  # noqa: E402
from megatron_sov.infer.request import Batching, Sampling, StopRule  # noqa: E402

PROMPTS = [[5, 9, 2, 70], [300], [8, 8, 8, 8]]


@pytest.mark.parametrize("family", ["exaone_moe", pytest.param("solar_open", marks=pytest.mark.deep)])
def test_engines_answer_the_same_work_alike(family: str, hf_models: dict[str, Path],
                                            imported: dict[str, Path], one_rank: None) -> None:
    def work(engine: Engine) -> Any:
        whole = engine.generate(PROMPTS, Sampling(8)).continuations
        ended = engine.generate(PROMPTS, Sampling(8), stop=StopRule((whole[0][2],))).continuations
        return {"whole": whole, "ended": ended,
                "same again": engine.generate(PROMPTS, Sampling(8, temperature=1.0, seed=4))
                == engine.generate(PROMPTS, Sampling(8, temperature=1.0, seed=4), streams=None)}

    expected = run_engine(TRANSFORMERS, find_target(hf_models[family]), work, longest=16,
                          batching=Batching(2, 5))
    assert len(expected["ended"][0]) <= 3 and expected["same again"]
    found = run_engine(MEGATRON, find_target(imported[family]), work, longest=16, batching=Batching(2, 5))
    assert found == expected
