"""Settings of a distillation."""

from __future__ import annotations

import math

from megatron_sov.config import DistillationConfig


def test_every_broken_rule_is_named() -> None:
    assert DistillationConfig().problems(100) == []
    assert DistillationConfig(0.5, 2.0, 99, keep_remainder=False, ce_coeff=0.1).problems(100) == []
    assert DistillationConfig(1.5, 0.0, 100, ce_coeff=-1).problems(100) == [
        "distillation.beta = 1.5 must lie in [0, 1]",
        "distillation.temperature = 0.0 must be a number greater than 0",
        "distillation.top_k = 100 must lie in [0, model.vocab_size = 100); 0 is the whole vocabulary",
        "distillation.ce_coeff = -1 must be a number that is not negative"]
    assert len(DistillationConfig(math.nan, math.inf, ce_coeff=math.nan).problems(100)) == 3
    assert DistillationConfig(keep_remainder=False).problems(100) == [
        "distillation.keep_remainder = false belongs to distillation.top_k: over the whole vocabulary "
        "nothing remains"]
