"""Prompts that show media, as a model reads them: ids, and what stands over their placeholders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_sov.base.chat.media_tokens import AUDIO, IMAGE, VocabularyBlock
from megatron_sov.base.errors import UserError
from megatron_sov.infer.asking import Asker
from megatron_sov.infer.media.shown_features import encoders_of, encoding_of, placed_media
from megatron_sov.infer.media.shown_media import BANK_OF, OPTIONS, ShownMedia
from megatron_sov.omni.media.banks import codecs_of, refuse_other_codecs
from megatron_sov.omni.media.placed import Media
from megatron_sov.omni.media.reading.reader import MediaReader

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target

Parts = Sequence[Mapping[str, Any]]
"""What a user shows and says: {"type": "text", "text": ...} or {"type": "image" | "audio" | "video", "path":
...}."""


@dataclass(frozen=True)
class Prompts:
    """Prompts as a model reads them."""

    asker: Asker
    """The model's tokenizer."""
    ids: list[list[int]]
    """Of each prompt."""
    media: list[Media]
    """What stands over the placeholders of each."""


def blocks_of(target: Target) -> dict[str, VocabularyBlock]:
    """Return kind -> ids of a model's codebooks; {} where it has none."""
    model = target.model
    found = {AUDIO: model.audio_tokens, IMAGE: model.image_tokens}
    return {kind: VocabularyBlock(kind, block.first, block.size) for kind,
            block in found.items() if block is not None}


def refuse_unknown_kinds(target: Target, kinds: Iterable[str]) -> None:
    """Raise `UserError` where a model has no discrete tokens of one of some kinds."""
    if lacking := sorted(set(kinds) - set(blocks_of(target))):
        raise UserError(f"{target.path}: has no discrete tokens of kind {lacking[0]} "
                        f"(model.{lacking[0]}_tokens is not set); ask one that was trained on "
                        "media, or leave these options out")


def prompts_of(target: Target, prompts: Sequence[Parts], shown: ShownMedia, *, chat: bool = True,
               with_features: bool = True) -> Prompts:
    """Return prompts as a model reads them: media as discrete tokens, then as features of its encoders, as
    far as it has learned from each.

    Args:
        target: the model.
        prompts: of each, what a user shows and says.
        shown: the folder of media, and the tokenizers that see and hear.
        chat: whether prompts are framed by the chat template.
        with_features: whether encoders see what is shown.

    Raises:
        UserError: the model has no tokens of such media, a codec is another one than that of its data or is
            not there, or a medium cannot be read.
    """
    refuse_unknown_kinds(target, shown.tokenizers)
    known = codecs_of(target.config.data.paths) if target.config is not None else {}
    refuse_other_codecs(shown.tokenizers, known, "--{kind}-tokenizer")
    kinds = {kind for parts in prompts for part in parts if (kind := str(part.get("type"))) in BANK_OF}
    for kind, option in OPTIONS.items():
        if kind in kinds and known.get(kind) and kind not in shown.tokenizers:
            raise UserError(f"{target.path}: has learned from discrete tokens of kind {kind}, which needs "
                            f"{option} CODEC, the one that its data were encoded with")
    encoders = encoders_of(target, {BANK_OF[kind] for kind in kinds}) if with_features else {}
    asker = Asker(target, chat, encoding_of(encoders))
    assert asker.meant is not None, "it was asked for"
    shown = replace(shown, encoders=encoders)
    with MediaReader(shown.root) as reader:
        told = [shown.shown(parts, reader, f"prompt {n}") for n, parts in enumerate(prompts, 1)]
    ids = asker.ask([one.text for one in told])
    media = [placed_media(of, one.records, asker.meant, encoders, f"prompt {n}")
             for n, (of, one) in enumerate(zip(ids, told, strict=True), 1)]
    return Prompts(asker, ids, media)
