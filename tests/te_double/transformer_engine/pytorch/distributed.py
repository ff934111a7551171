"""Activation recomputation, and a tracker of random states, each with a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from .quantization import FP8GlobalStateManager, autocast

_all_states: dict[str, torch.Tensor] = {}
_in_region = False
_in_recompute_phase = False


def get_all_rng_states() -> dict[str, torch.Tensor]:
    """Return the states that `set_all_rng_states` stored last."""
    return _all_states


def set_all_rng_states(states: dict[str, torch.Tensor]) -> None:
    """Store the states of a tracker."""
    global _all_states
    _all_states = states


class activation_recompute_forward(AbstractContextManager[None]):
    """Context of a forward pass with recomputed activations: the first pass, or the recomputation."""

    def __init__(self, activation_recompute: bool = False, recompute_phase: bool = False) -> None:
        self._new = activation_recompute, recompute_phase

    def __enter__(self) -> None:
        global _in_region, _in_recompute_phase
        _in_region, _in_recompute_phase = self._new

    def __exit__(self, *exc_details: Any) -> None:
        global _in_region, _in_recompute_phase
        _in_region = _in_recompute_phase = False


def is_fp8_activation_recompute_enabled() -> bool:
    """Return whether activations will be recomputed with quantized products."""
    return _in_region and FP8GlobalStateManager.is_fp8_enabled()


def in_fp8_activation_recompute_phase() -> bool:
    """Return whether activations are being recomputed."""
    return _in_recompute_phase


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, and recompute its activations in the backward pass with the same recipe and random
    numbers.

    Args:
        function: called with `args` and the remaining `kwargs`.
        args: tensors and other values.
        kwargs: `distribute_saved_activations`, `get_rng_state_tracker` and `tp_group` are not passed on.
    """
    if kwargs.pop("distribute_saved_activations", False):
        raise NotImplementedError("the double distributes no activations")
    kwargs.pop("tp_group", None)
    get_tracker = kwargs.pop("get_rng_state_tracker", None)
    fp8 = FP8GlobalStateManager.is_fp8_enabled()
    recipe = FP8GlobalStateManager.get_fp8_recipe() if fp8 else None
    states, num_calls = get_tracker().get_states() if get_tracker else {}, 0

    def run(*tensors: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:  # the second call recomputes
            with activation_recompute_forward(True, False):
                return function(*tensors, **kwargs)
        current_states = get_tracker().get_states() if get_tracker else {}
        if get_tracker:
            get_tracker().set_states(states)
        try:
            with activation_recompute_forward(True, True), autocast(enabled=fp8, recipe=recipe):
                return function(*tensors, **kwargs)
        finally:
            if get_tracker:
                get_tracker().set_states(current_states)

    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=True)


class CudaRNGStatesTracker:
    """Random states by name."""

    def __init__(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        """Remove all states."""
        self.states_, self.seeds_ = {}, set()

    def get_states(self) -> dict[str, torch.Tensor]:
        """Return name -> state."""
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Replace all states."""
        self.states_ = states
        set_all_rng_states(self.states_)

    def add(self, name: str, seed: int) -> None:
        """Add a state that starts from a seed."""
        if seed in self.seeds_:
            raise RuntimeError(f"seed {seed} already exists")
        if name in self.states_:
            raise RuntimeError(f"cuda rng state {name} already exists")
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()
        set_all_rng_states(self.states_)

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw random numbers from the named state inside the context."""
        if name not in self.states_:
            raise KeyError(f"cuda rng state {name} is not added")
        original = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(original)
