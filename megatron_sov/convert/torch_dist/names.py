"""Under which names, and in which pieces, Megatron-LM keeps the tensors that we keep under our own.

Both go by the library's global names, so most are the same.  What differs: layers of one kind may be stacked
along a leading axis (`decoder.layers.mlp...` [layers, ...], the default up to megatron-core 0.15), experts
and the halves of a gated matrix may be tensors of their own, and some norms are named after the module that
they are fused into.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

_LAYER = re.compile(r"(decoder\.layers)\.(\d+)\.(.+)")
_ALIASES = ((".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
            (".transformer_layer.", ".mtp_model_layer."))
"""What a name may have in the place of ours: the norm before experts without Transformer Engine, and the
layer inside a prediction layer in later versions."""
_EXPERTS = ".experts.experts."
PREFIXES = ("", "module.")
"""What may stand before all names: NeMo's wrapper."""
HALVES = ("_w", "_v")
"""What a gated matrix's halves, gate and up, are called behind its name."""


@dataclass(frozen=True)
class Source:
    """Where a block of one of our tensors stands."""

    key: str
    """Their tensor."""
    lead: tuple[int, ...]
    """Places along axes that theirs has before those of ours."""
    drops_expert: bool = False
    """Whether theirs holds one expert, and has no axis of experts."""


def sources(key: str, expert: int | None, found: Collection[str]) -> list[Source] | None:
    """Return where a tensor, or an expert of it, stands; two for the halves of a gated matrix; None: nowhere.

    Args:
        key: our name.
        expert: of a tensor with an axis of experts, the one that is wanted.
        found: their names.
    """
    for name, lead, drops in _candidates(key, expert):
        if name in found:
            return [Source(name, lead, drops)]
        if all(name + half in found for half in HALVES):
            return [Source(name + half, lead, drops) for half in HALVES]
    return None


def _candidates(key: str, expert: int | None) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    names = [key]
    for ours, theirs in _ALIASES:
        names += [name.replace(ours, theirs, 1) for name in names if ours in name]
    for name in names:
        layer = _LAYER.fullmatch(name)
        forms = [(name, ())] + ([(f"{layer[1]}.{layer[3]}", (int(layer[2]),))] if layer else [])
        for form, lead in forms:
            yield form, lead, False
            if expert is not None and _EXPERTS in form:
                yield form.replace(_EXPERTS, f"{_EXPERTS}{expert}.", 1), lead, True
