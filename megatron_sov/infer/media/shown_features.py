"""Features of encoders in a prompt: which of a model's encoders see what it is shown, and over which
placeholders their features stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_sov.base.documents import BadRecord
from megatron_sov.base.errors import UserError, warn
from megatron_sov.model.config import AudioEncoderConfig, VisionEncoderConfig
from megatron_sov.omni.media.banks import PICTURES, SOUNDS, banks_of
from megatron_sov.omni.media.meant import MeantTokens, MediaEncoding
from megatron_sov.omni.media.placed import Media, place_media

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target

Encoders = Mapping[str, VisionEncoderConfig | AudioEncoderConfig]
"""Kind of bank -> the encoder of its records."""
Records = Mapping[str, Sequence[tuple[np.ndarray, int]]]
"""Kind of bank -> records of a prompt in the order of their placeholders, and how many slots of each are
used."""


def encoders_of(target: Target, shown: set[str]) -> dict[str, VisionEncoderConfig | AudioEncoderConfig]:
    """Return the encoders that see what prompts show: those of whose features the model has learned.

    Where a model's data are gone, trained adapters tell that it has, and a warning tells what was taken.

    Args:
        target: the model.
        shown: kinds of banks that prompts have something for.
    """
    model, config = target.model, target.config
    banks = banks_of(config.data.paths) if config is not None else None
    trained = config is None or config.media.train_adapters or config.media.train_encoders
    found: dict[str, VisionEncoderConfig | AudioEncoderConfig] = {}
    for kind, encoder in ((PICTURES, model.vision), (SOUNDS, model.audio)):
        if encoder is None or kind not in shown:
            continue
        if banks is None:
            taken = "prompts show them" if trained else "prompts do not reach it, as its adapter was frozen"
            warn(f"{target.path}: has an encoder of {kind}, and data that would tell whether it has learned "
                 f"from its features are not there: {taken}")
        if trained if banks is None else kind in banks:
            found[kind] = encoder
    return found


def encoding_of(encoders: Encoders) -> MediaEncoding:
    """Return how ids of prompts become numbers of features."""
    return MediaEncoding(tuple((kind, encoder.slots) for kind, encoder in encoders.items()))


def placed_media(ids: Sequence[int], records: Records, meant: MeantTokens, encoders: Encoders,
                 where: str) -> Media:
    """Return what stands over the placeholders of a prompt.

    Args:
        ids: of the prompt.
        records: what it shows.
        meant: the tokenizer's tokens of media, made with `encoding_of` these encoders.
        encoders: which see it.
        where: names the prompt in a message.

    Raises:
        UserError: the chat template has lost placeholders, or the tokenizer's are not the encoder's.
    """
    try:
        numbers = meant.numbers(ids, {kind: [(row, used) for row, (_, used) in enumerate(of_kind)]
                                      for kind, of_kind in records.items()})
    except BadRecord as e:
        raise UserError(f"{where}: {e}; its chat template must show what a user says as it is") from None
    tokens, found = np.asarray(ids, np.int64), {}
    for kind, of_kind in records.items():
        encoder = encoders[kind]
        places = np.flatnonzero(np.isin(tokens, meant.placeholder_ids(kind)))
        if unknown := sorted({*tokens[places].tolist()} - {*encoder.placeholder_ids}):
            name = "vision" if kind == PICTURES else "audio"
            raise UserError(f"{where}: its {kind} stand at placeholders {unknown}, which are not among "
                            f"model.{name}.placeholder_ids = {list(encoder.placeholder_ids)}; put the "
                            "tokenizer there that the model was trained with")
        found[kind] = place_media(places, numbers[places], [record for record, _ in of_kind], encoder.slots)
    return found
