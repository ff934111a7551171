"""AdamW with bf16 moments over the double's FusedAdam, and with a share of its state in host memory."""

from pathlib import Path
from typing import Any

import pytest

RUN = str(Path(__file__).with_name("quantized_run.py"))
SETTINGS = {"fp32": "gpu.moment_dtype=fp32", "bf16": "gpu.moment_dtype=bf16",
            "host": "gpu.optimizer_offload=0.5"}
CONTINUED = (("fp32", "bf16", "bfloat16"), ("bf16", "bf16", "bfloat16"), ("fp32", "host", "float32"))
"""(run that saved the checkpoint, settings of the run that loads it, dtype of its moments)."""


@pytest.mark.distributed
@pytest.mark.deep
@pytest.mark.parametrize(("names", "nproc"), [(("bf16",), 1), (tuple(SETTINGS), 2)], ids=["bf16", "all"])
def test_moments_in_bf16_are_exact_over_checkpoints(te_ranks: Any, job: Any, packed_data: Any, tmp_path: Path,
                                                    names: tuple[str, ...], nproc: int) -> None:
    """A resumed run has the bits of an uninterrupted run, a float32 run continues in bf16 or in host memory,
    and a step computes the moments in float32 and rounds them once."""
    common = ["parallel.zero1=true", "model.num_layers=2"]
    runs = {name: {"recipe": "tiny-k-exaone", "path": str(packed_data.text),
                   "settings": [*common, SETTINGS[name]]}
            for name in names}
    result = te_ranks(*(job(RUN, "resume_and_compare", nproc, {**arguments, "run": str(tmp_path / name)})
                        for name, arguments in runs.items()))
    for rank in (rank for ranks in result for rank in ranks):
        assert rank["resumed"] == rank["straight"][2:] and rank["resumed ends"] == rank["straight ends"]
    if len(names) == len(SETTINGS):
        _check_differences(*(ranks[0] for ranks in result))
    for before, after, dtype in CONTINUED:
        if not {before, after} <= {*names}:
            continue
        folder = str(tmp_path / before / "checkpoints" / "step-2")
        for rank in te_ranks(job(RUN, "compare_moments", nproc, {**runs[after], "before": folder}))[0]:
            assert rank["dtypes"] == [f"exp_avg {dtype}", f"exp_avg_sq {dtype}", "master float32"]
            assert rank["wrong"] == 0
            # whole parameters move to host memory until they have at least half of the elements
            assert 0.5 <= rank["on the host"] < 0.9 if after == "host" else rank["on the host"] == 0


def _check_differences(wide: dict[str, Any], narrow: dict[str, Any], host: dict[str, Any]) -> None:
    """Compare losses of runs with moments in float32, in bf16 and in host memory."""
    assert narrow["straight ends"] != wide["straight ends"]
    # sums in host memory have another order, which may change the rounding of bf16 weights
    assert host["straight"] == pytest.approx(wide["straight"], rel=5e-4)
    # AdamW's first step is a sign for every dtype, up to rounding
    assert narrow["straight"][:2] == pytest.approx(wide["straight"][:2], rel=1e-4)
    assert narrow["straight"] == pytest.approx(wide["straight"], rel=1e-2)
