"""Contexts that select the quantization recipe of products and parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any

from ..common.recipe import DelayedScaling, Recipe


@dataclass
class FP8GlobalState:
    """Quantization state of this process."""

    fp8_enabled: bool = False
    fp8_calibration: bool = False
    fp8_recipe: Recipe | None = None
    fp8_distributed_group: Any = None
    fp8_parameters: bool = False
    high_precision_init_val: bool = False


class FP8GlobalStateManager:
    """Access to the state that the contexts set."""

    quantization_state = FP8GlobalState()

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Return whether matrix products are quantized."""
        return cls.quantization_state.fp8_enabled

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        """Return whether scales are collected without quantization."""
        return cls.quantization_state.fp8_calibration

    @classmethod
    def with_fp8_parameters(cls) -> bool:
        """Return whether new parameters are quantized tensors."""
        return cls.quantization_state.fp8_parameters

    @classmethod
    def with_high_precision_init_val(cls) -> bool:
        """Return whether new quantized parameters store their high-precision initial values."""
        return cls.quantization_state.high_precision_init_val

    @classmethod
    def get_fp8_recipe(cls) -> Recipe:
        """Return the active or the default recipe."""
        return cls.quantization_state.fp8_recipe or DelayedScaling()

    @classmethod
    def get_fp8_group(cls) -> Any:
        """Return the process group for the maximum of largest values."""
        return cls.quantization_state.fp8_distributed_group

    @classmethod
    def reset(cls) -> None:
        """Reset the state to its defaults."""
        cls.quantization_state = FP8GlobalState()


class autocast:
    """Context in which modules quantize their matrix products by a recipe."""

    def __init__(self, enabled: bool = True, calibrating: bool = False, recipe: Recipe | None = None,
                 amax_reduction_group: Any = None, _graph: bool = False) -> None:
        self._new = enabled, calibrating, recipe or DelayedScaling(), amax_reduction_group
        self._old: FP8GlobalState | None = None

    def __enter__(self) -> autocast:
        if self._old is not None:
            raise RuntimeError("autocast context manager cannot be entered more than once concurrently")
        self._old = FP8GlobalStateManager.quantization_state
        parameter_settings = astuple(self._old)[4:]
        FP8GlobalStateManager.quantization_state = FP8GlobalState(*self._new, *parameter_settings)
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        assert self._old is not None
        FP8GlobalStateManager.quantization_state, self._old = self._old, None


def fp8_autocast(enabled: bool = True, calibrating: bool = False, fp8_recipe: Recipe | None = None,
                 fp8_group: Any = None, _graph: bool = False) -> autocast:
    """Return `autocast`; its previous name."""
    return autocast(enabled, calibrating, fp8_recipe, fp8_group, _graph)


@contextmanager
def quantized_model_init(enabled: bool = True, recipe: Recipe | None = None,
                         preserve_high_precision_init_val: bool = False) -> Iterator[None]:
    """Context in which new modules have quantized parameters."""
    manager = FP8GlobalStateManager
    old = manager.quantization_state
    manager.quantization_state = replace(
        old, fp8_parameters=enabled, fp8_recipe=recipe or DelayedScaling(),
        high_precision_init_val=preserve_high_precision_init_val)
    try:
        yield
    finally:
        manager.quantization_state = old


def fp8_model_init(enabled: bool = True, recipe: Recipe | None = None,
                   preserve_high_precision_init_val: bool = False) -> Any:
    """Return `quantized_model_init`; its previous name."""
    return quantized_model_init(enabled, recipe, preserve_high_precision_init_val)
