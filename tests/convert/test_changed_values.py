"""Changed values alone make what all values would have made, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_sov.base.errors import UserError
from megatron_sov.convert.changed_values import (
    DTYPES, Changed, SentWeights, check_space, convert_tensor, exported_dtype, planned_dtype)

Weights = dict[str, torch.Tensor]


def sent(weights: Weights) -> SentWeights:
    """Return a sender that has sent these."""
    found = SentWeights()
    assert [name for name, _ in found.whole(weights.items())] == list(weights)
    return found


def patched(held: Weights, changed: Iterator[Changed]) -> Weights:
    """Write changes into a copy of weights, value by value."""
    held = {name: tensor.clone() for name, tensor in held.items()}
    for one in changed:
        for place, value in zip(one.places.tolist(), one.values, strict=True):
            held[one.name].view(-1)[place] = value
    return held


def bits(weights: Weights) -> dict[str, bytes]:
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes()
            for name, tensor in weights.items()}


def test_a_step_of_bf16_weights_sends_what_rounding_leaves_of_it() -> None:
    torch.manual_seed(0)
    master = {"a": torch.randn(300, 200) * 0.05, "norm": torch.ones(200)}
    before = {name: tensor.bfloat16() for name, tensor in master.items()}
    after = {name: (tensor + 3e-6 * torch.randn(tensor.shape)).bfloat16() for name, tensor in master.items()}
    sender = sent(before)
    changed = list(sender.changed(after.items()))
    assert bits(patched(before, iter(changed))) == bits(after) != bits(before)
    of_a, of_norm = changed
    assert (of_norm.name, len(of_norm.values), of_norm.shape) == ("norm", 0, (200,))
    share = len(of_a.values) / of_a.places.new_tensor(of_a.shape).prod()
    assert 0 < share < 0.1 and of_a.num_bytes == 6 * len(of_a.values) < before["a"].nbytes / 3
    assert of_a.values.dtype == torch.bfloat16 and of_a.places.dtype == torch.int32
    assert [one.num_bytes for one in sender.changed(after.items())] == [0, 0]


def test_bits_are_compared_and_not_values() -> None:
    nan = float("nan")
    before, after = {"a": torch.tensor([0.0, nan, 1.0])}, {"a": torch.tensor([-0.0, nan, 1.0])}
    (changed,) = sent(before).changed(after.items())
    assert changed.places.tolist() == [0] and torch.signbit(changed.values).all()


def test_a_tensor_in_another_order_of_memory_is_the_same() -> None:
    weights = {"a": torch.arange(6.0).reshape(2, 3).T}
    sender = sent(weights)
    weights["a"][2, 0] = 9.0
    (changed,) = sender.changed(weights.items())
    assert changed.places.tolist() == [4] and [axis.tolist() for axis in changed.coordinates()] == [[2], [0]]
    assert [one.num_bytes for one in sender.changed(weights.items())] == [0]


def test_what_was_not_sent_to_the_end_is_sent_whole_again() -> None:
    weights = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(ValueError, match="not sent to the end"):
        next(SentWeights().changed(weights.items()))
    sender = sent(weights)
    next(sender.changed(weights.items()))
    with pytest.raises(ValueError, match="not sent to the end"):
        next(sender.changed(weights.items()))
    for others, message in (({"a": weights["a"]}, "1 tensors were sent before and are missing now"),
                            (weights | {"a": torch.zeros(3)}, r"a, \[3\] of torch.float32: is none"),
                            (weights | {"c": torch.zeros(1)}, "c, .* is none of the tensors")):
        sender = sent(weights)
        with pytest.raises(ValueError, match=message):
            list(sender.changed(others.items()))


# One NaN or infinity anywhere is found, whatever the dtype; values that fit are converted as torch does it.


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_value_anywhere_is_found(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 7, 31, 200, 1022):  # wherever it falls in the vectors that a processor takes at a time
        tensor = torch.randn(1023).to(dtype)
        tensor[place] = bad
        with pytest.raises(UserError,
                           match=f"source: w holds {'NaN' if bad != bad else 'infinity'} .1 of 1023 values"):
            convert_tensor(tensor, dtype, Path("source"), "w")


def test_finite_values_keep_their_bits_or_are_rounded_once() -> None:
    for dtype in DTYPES.values():
        limits = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0, -0.0], dtype=dtype)
        assert convert_tensor(limits, dtype, Path("source"), "w") is limits
    assert convert_tensor(torch.empty(0, 3), torch.bfloat16, Path("source"), "w").shape == (0, 3)
    wide = torch.randn(100)
    assert convert_tensor(wide, torch.bfloat16, Path("source"), "w").equal(wide.bfloat16())
    with pytest.raises(UserError, match=r"w: its largest value 3.40282e\+38 does not fit bfloat16"):
        convert_tensor(torch.tensor([torch.finfo(torch.float32).max]), torch.bfloat16, Path("source"), "w")


def test_planned_dtypes() -> None:
    assert planned_dtype("keep", False, torch.float64) == torch.float64
    assert exported_dtype("keep", False, torch.float64) == torch.float32
    assert exported_dtype("float64", False, torch.bfloat16) == torch.float64
    assert (planned_dtype("bfloat16", True, torch.float32) == exported_dtype("keep", True, torch.float64)
            == torch.float32)


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    check_space(tmp_path / "out", 1)
    with pytest.raises(UserError, match=r"needs 1000000\.0 TB, but .* has \d+\.\d \wB free"):
        check_space(tmp_path / "out", 10**18)
