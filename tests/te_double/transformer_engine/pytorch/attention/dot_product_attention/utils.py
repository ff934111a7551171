"""The choice of attention, which the real library's module asks for by this name where a call is not as the
last one was."""

from __future__ import annotations

from ... import placement as machine
from ..backends import AttentionCall, choose


def get_attention_backend(attention_params: AttentionCall) -> str:
    """Return the backend that serves."""
    return choose(attention_params, machine.CHIP)
