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

ASKED: Any = attention_kernels._query_backends


@pytest.fixture
def rejecting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[set[int], bool], None]]:
    """A Transformer Engine without kernels for some windows, which it reports only to a disabled log."""
    utils = ModuleType("utils")
    utils.__dict__["AttentionLogging"] = SimpleNamespace(_log_level=logging.WARNING)
    utils.__dict__["AttentionParams"] = dataclasses.make_dataclass("Asked", ["num_heads", "window_size"])

    def without(rejected: set[int], flash: bool) -> None:
        def decide(params: Any) -> tuple[Any, ...]:
            log = logging.getLogger("DotProductAttention")
            log.setLevel(utils.AttentionLogging._log_level)
            fused = params.window_size[0] + 1 not in rejected
            if not fused:
                log.debug("Disabling FusedAttention: %s", "cuDNN Error: no engine")
            return flash, None, fused, None, not fused and not flash, []

        utils.__dict__["get_attention_backend"] = decide

    name = ""
    for part in ("transformer_engine", ".pytorch", ".attention", ".dot_product_attention"):
        name += part
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[name].__dict__["utils"] = utils
    monkeypatch.setattr(attention_kernels, "_query_backends", asked := functools.cache(ASKED.__wrapped__))
    for module in (attention_kernels, gpu_settings):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    yield without
    asked.cache_clear()


@pytest.mark.parametrize(("rejected", "flash", "attention"), [
    (set[int](), False, "auto"), ({0}, False, "local"), ({128}, False, "local"), ({128}, True, "auto")])
def test_auto_uses_our_attention_without_a_packed_kernel(rejected: set[int], flash: bool, attention: str,
                                                         rejecting: Callable[[set[int], bool], None],
                                                         logged: list[logging.LogRecord]) -> None:
    """Transformer Engine would otherwise silently compute whole-row products: 11 of the 12 s of a step on an
    H200. `fused` accepts only cuDNN."""
    rejecting(rejected, flash)
    config = apply_settings(recipes.get("tiny-k-exaone"), [
        "train.precision=bf16", "model.sliding_window_tokens=128"])
    assert gpu_settings.resolve_auto_settings(config, te=True)["attention"] == attention
    fused = apply_settings(config, ["gpu.attention=fused"])
    if rejected:
        with pytest.raises(SettingsError, match="4 query heads of size 32"):
            gpu_settings.check_gpu_settings(fused, te=True)  # as before a run
    else:
        gpu_settings.check_gpu_settings(fused, te=True)
    assert not logged, "what it says is for us"
