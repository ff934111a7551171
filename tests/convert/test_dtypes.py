"""Values are checked and rounded once, and a full disk is detected before writing."""

from pathlib import Path

import pytest
import torch

from megatron_sov.base.errors import UserError
from megatron_sov.convert.dtypes import DTYPES, check_space, choose_dtype, choose_export_dtype, convert_tensor

# A NaN or infinity is found at any position and dtype; finite values are converted as in torch.


@pytest.mark.each("dtype", DTYPES.values())
@pytest.mark.each("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_value_is_detected_at_any_position(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 7, 31, 200, 1022):  # wherever it falls in the vectors that a processor takes at a time
        tensor = torch.randn(1023).to(dtype)
        tensor[place] = bad
        kind = "NaN" if bad != bad else "infinity"
        with pytest.raises(UserError, match=f"source: w contains {kind} .1 of 1023 values"):
            convert_tensor(tensor, dtype, Path("source"), "w")


def test_finite_values_are_unchanged_or_rounded_once() -> None:
    for dtype in DTYPES.values():
        limits = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0, -0.0], dtype=dtype)
        assert convert_tensor(limits, dtype, Path("source"), "w") is limits
    assert convert_tensor(torch.empty(0, 3), torch.bfloat16, Path("source"), "w").shape == (0, 3)
    wide = torch.randn(100)
    assert convert_tensor(wide, torch.bfloat16, Path("source"), "w").equal(wide.bfloat16())
    with pytest.raises(UserError, match=r"largest value 3.40282e\+38"):
        convert_tensor(torch.tensor([torch.finfo(torch.float32).max]), torch.bfloat16, Path("source"), "w")


def test_planned_dtypes() -> None:
    assert choose_dtype("keep", False, torch.float64) == torch.float64
    assert choose_export_dtype("keep", False, torch.float64) == torch.float32
    assert choose_export_dtype("float64", False, torch.bfloat16) == torch.float64
    assert (choose_dtype("bfloat16", True, torch.float32) == choose_export_dtype("keep", True, torch.float64)
            == torch.float32)


def test_full_disk_is_detected_before_writing(tmp_path: Path) -> None:
    check_space(tmp_path / "out", 1)
    with pytest.raises(UserError, match="needs 1,000,000 TB,"):
        check_space(tmp_path / "out", 10**18)
