"""AdamW's moments in bf16, by the library's precision-aware optimizer over the double's FusedAdam."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

RUN = str(Path(__file__).with_name("quantized_run.py"))


@pytest.mark.distributed
def test_moments_in_bf16_are_exact_over_checkpoints(te_ranks: Any, job: Any, packed_data: Any,
                                                    tmp_path: Path) -> None:
    """A resumed run has the bits of one that was not stopped, one in float32 can go on in bf16, and a step
    rounds the formula's moments once."""
    runs = {dtype: {"recipe": "tiny-k-exaone", "path": str(packed_data.text),
                    "settings": ["parallel.zero1=true", f"gpu.moment_dtype={dtype}"]}
            for dtype in ("fp32", "bf16")}
    found = te_ranks(*(job(RUN, "continued", 2, {**arguments, "run": str(tmp_path / dtype)})
                       for dtype, arguments in runs.items()))
    wide, narrow = (ranks[0] for ranks in found)
    for rank in (*found[0], *found[1]):
        assert rank["resumed"] == rank["straight"][2:] and rank["resumed ends"] == rank["straight ends"]
    assert narrow["straight ends"] != wide["straight ends"]
    # AdamW's first step is a sign, whatever the dtype, up to rounding
    assert narrow["straight"][:2] == pytest.approx(wide["straight"][:2], rel=1e-4)
    assert narrow["straight"] == pytest.approx(wide["straight"], rel=1e-2)
    for dtype in ("fp32", "bf16"):
        before = str(tmp_path / dtype / "checkpoints" / "step-2")
        for rank in te_ranks(job(RUN, "moments", 2, {**runs["bf16"], "before": before}))[0]:
            assert rank["dtypes"] == ["exp_avg bfloat16", "exp_avg_sq bfloat16", "master float32"]
            assert rank["wrong"] == 0
