"""8-bit products: the library's settings, what is refused before anything starts, checkpoints of experts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov.config import TrainConfig
from megatron_sov.errors import UserError
from megatron_sov.mcore.model.quantization import (
    in_bf16,
    keep_ends_in_bf16,
    library_settings,
    mend_extra_state,
    refuse_without_chip,
)


def test_each_recipe_has_the_librarys_names() -> None:
    assert library_settings(TrainConfig()) == {}
    assert library_settings(TrainConfig(fp8="blockwise", fp8_bf16_layers_at_end=2)) == {
        "fp8": "e4m3", "fp8_recipe": "blockwise", "moe_router_padding_for_quantization": False}
    fp4 = library_settings(TrainConfig(fp8="nvfp4", fp8_pad_routed_tokens=True))
    assert (fp4["fp4"], fp4["fp4_recipe"]) == ("e2m1", "nvfp4")
    assert fp4["moe_router_padding_for_quantization"] and "fp8" not in fp4


def test_layers_in_bf16_are_asked_by_their_number_in_the_model() -> None:
    """Three of four at the start, whatever the stages: the library's configuration would refuse them at
    `parallel.pp` = 2, and is told behind its validation."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    config = SimpleNamespace(num_layers=4)
    keep_ends_in_bf16(config, TrainConfig(fp8="blockwise", fp8_bf16_layers_at_start=3))
    assert [is_first_last_bf16_layer(config, layer) for layer in range(4)] == [True, True, True, False]
    keep_ends_in_bf16(config, TrainConfig(fp8="blockwise"))
    assert not any(is_first_last_bf16_layer(config, layer) for layer in range(4))


def chip(monkeypatch: pytest.MonkeyPatch, has: set[str]) -> None:
    """Let Transformer Engine be there, with a GPU that has these recipes."""
    def answer(found: bool) -> Callable[..., Any]:
        reason = "" if found else "compute capability 10.0 or higher required"
        return lambda return_reason=False: (found, reason) if return_reason else found

    te = ModuleType("transformer_engine.pytorch")
    te.is_fp8_available, te.is_fp8_block_scaling_available = (  # type: ignore[attr-defined]
        answer("tensorwise" in has), answer("blockwise" in has))
    te.is_mxfp8_available, te.is_nvfp4_available = (  # type: ignore[attr-defined]
        answer("mxfp8" in has), answer("nvfp4" in has))
    package = ModuleType("transformer_engine")
    package.pytorch = te  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", te)


def test_a_chip_that_cannot_is_told_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    chip(monkeypatch, {"tensorwise", "blockwise"})  # a Hopper
    refuse_without_chip(TrainConfig(fp8="blockwise"), serves=True)
    for fp8 in ("mxfp8", "nvfp4"):
        with pytest.raises(UserError, match=f"{fp8} cannot run on this GPU .*10.0 or higher required.*"
                                            "tensorwise or blockwise or none"):
            refuse_without_chip(TrainConfig(fp8=fp8), serves=True)


def test_a_cpu_is_refused_before_anything_starts(run_command, packed_data, tmp_path: Path) -> None:
    done = run_command("pretrain", "tiny-solar-open", "--data", str(packed_data.text), "--run",
                       str(tmp_path / "run"), "--set", "train.precision=bf16",
                       "--set", "train.fp8=tensorwise")
    assert done.returncode == 2, done.stderr
    assert "train.fp8 = tensorwise needs an NVIDIA GPU with Transformer Engine" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_what_is_only_read_is_not_quantised() -> None:
    config = SimpleNamespace(fp8="e4m3", fp4=None, moe_router_padding_for_quantization=True)
    with pytest.raises(KeyError), in_bf16(config):
        assert (config.fp8, config.fp4, config.moe_router_padding_for_quantization) == (None, None, False)
        raise KeyError
    assert (config.fp8, config.fp4, config.moe_router_padding_for_quantization) == ("e4m3", None, True)


class Grouped:
    """A layer of three experts as the library's `TEGroupedLinear`, as far as saving its extra state goes."""

    def __init__(self) -> None:
        self.num_gemms, self.fp8, self.fp8_calibration = 3, True, False
        self.fp8_meta = {"fp8_checkpoint": True}

    def _decode_extra_state(self, state: torch.Tensor) -> dict[str, Any] | None:
        return {"extra_fp8_variables": {}} if state.numel() else None

    def _split_extra_state(self, state: torch.Tensor) -> list[torch.Tensor]:
        decoded: Any = self._decode_extra_state(state)
        return [state + len(decoded["extra_fp8_variables"]) for _ in range(self.num_gemms)]


def test_experts_whose_recipe_keeps_no_state_are_saved() -> None:
    empty, full = torch.empty(0, dtype=torch.uint8), torch.ones(4, dtype=torch.uint8)
    with pytest.raises(TypeError, match="not subscriptable"):
        Grouped()._split_extra_state(empty)
    mend_extra_state(Grouped)
    mended = Grouped._split_extra_state
    assert [part.numel() for part in Grouped()._split_extra_state(empty)] == [0, 0, 0]
    assert [part.tolist() for part in Grouped()._split_extra_state(full)] == [[1, 1, 1, 1]] * 3
    mend_extra_state(Grouped)  # and a mended library is left alone
    assert Grouped._split_extra_state is mended
