"""Transformer Engine's answer decides which kernel attends packed rows."""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sov import recipes
from megatron_sov.base.settings import SettingsError
from megatron_sov.engine.model import attention_kernels, gpu_settings
from megatron_sov.model.config import apply_settings

QUERY_BACKENDS: Any = attention_kernels._query_backends


@pytest.fixture
def simulate_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[set[int], bool], None]]:
    """Return `simulate(rejected_windows, has_flash)`: simulate a Transformer Engine without fused kernels
    for some window sizes; it gives the reason only in a disabled log."""
    utils = ModuleType("utils")
    utils.__dict__["AttentionLogging"] = SimpleNamespace(_log_level=logging.WARNING)
    utils.__dict__["AttentionParams"] = dataclasses.make_dataclass("AttentionParams",
                                                                   ["num_heads", "window_size"])

    def simulate(rejected_windows: set[int], has_flash: bool) -> None:
        def get_attention_backend(params: Any) -> tuple[Any, ...]:
            log = logging.getLogger("DotProductAttention")
            log.setLevel(utils.AttentionLogging._log_level)
            has_fused = params.window_size[0] + 1 not in rejected_windows
            if not has_fused:
                log.debug("Disabling FusedAttention: %s", "cuDNN Error: no engine")
            # As Transformer Engine's: flash, its version, fused, its backend, unfused, all available.
            return has_flash, None, has_fused, None, not has_fused and not has_flash, []

        utils.__dict__["get_attention_backend"] = get_attention_backend

    name = ""
    for component in ("transformer_engine", ".pytorch", ".attention", ".dot_product_attention"):
        name += component
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[name].__dict__["utils"] = utils
    # A cache of its own: answers of this Transformer Engine must not reach other tests.
    query_backends = functools.cache(QUERY_BACKENDS.__wrapped__)
    monkeypatch.setattr(attention_kernels, "_query_backends", query_backends)
    for module in (attention_kernels, gpu_settings):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    yield simulate
    query_backends.cache_clear()


@pytest.mark.parametrize(("rejected_windows", "has_flash", "attention"), [
    (set[int](), False, "auto"), ({0}, False, "local"), ({128}, False, "local"), ({128}, True, "auto")])
def test_auto_uses_our_attention_without_a_packed_kernel(
        rejected_windows: set[int], has_flash: bool, attention: str,
        simulate_kernels: Callable[[set[int], bool], None], logged: list[logging.LogRecord]) -> None:
    """Transformer Engine would otherwise silently compute whole-row products: 11 of the 12 s of a step on an
    H200. `fused` accepts only cuDNN."""
    simulate_kernels(rejected_windows, has_flash)
    config = apply_settings(recipes.get("tiny-k-exaone"), [
        "train.precision=bf16", "model.sliding_window_tokens=128"])
    assert gpu_settings.resolve_auto_settings(config, te=True)["attention"] == attention
    fused_config = apply_settings(config, ["gpu.attention=fused"])
    if rejected_windows:
        with pytest.raises(SettingsError, match="4 query heads of size 32"):
            gpu_settings.check_gpu_settings(fused_config, te=True)  # as before a run
    else:
        gpu_settings.check_gpu_settings(fused_config, te=True)
    assert not logged, "Transformer Engine's log is read, but not shown to users"
