"""The kinds of codec there are; none is imported before it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from megatron_sov.errors import UserError, how_to_install

KNOWN = {
    "simvq": "megatron_sov.codecs.images.simvq:SimVQTokenizer",
    "ta-tok": "megatron_sov.codecs.images.ta_tok:TATok",
    "fsq": "megatron_sov.codecs.sounds.fsq:FSQTokenizer",
    "cosyvoice2": "megatron_sov.codecs.sounds.cosyvoice2:CosyVoice2Tokenizer",
    "nemo-audio": "megatron_sov.codecs.sounds.nemo_audio:NemoAudioTokenizer",
    "dit": "megatron_sov.codecs.images.dit:DiT",
    "unit-bigvgan": "megatron_sov.codecs.sounds.bigvgan:UnitBigVGAN",
}
"""Kind, as manifests have it -> module and class.  A class is an `nn.Module` that is made of its `Settings`
and keeps them as `.settings`."""


def codec_class(kind: str, where: str) -> Any:
    """Return the class of a kind.

    Raises:
        UserError: there is no such kind, or a package that it needs is not installed.
    """
    if kind not in KNOWN:
        raise UserError(f"{where}: {kind!r} is no kind of codec; there are {', '.join(KNOWN)}")
    module, _, name = KNOWN[kind].partition(":")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("megatron_sov"):
            raise
        raise UserError(f"{where}: a codec of kind {kind!r} needs the package {e.name}; install it by "
                        f"`{how_to_install('omni')}`") from None
