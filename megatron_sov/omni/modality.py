"""What the core is given of pictures and sounds (`model.modality.Modality`): banks of token shards, encoders,
tokens, and the files of processors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sov.base.documents.shard_files import DAMAGED, NO_FEATURE
from megatron_sov.base.errors import UserError
from megatron_sov.chat import media_tokens as marks
from megatron_sov.chat.media_tokens import AUDIO, IMAGE
from megatron_sov.model.config import AudioEncoderConfig, ModelConfig, VisionEncoderConfig
from megatron_sov.model.families.encoders import HF_PREFIXES
from megatron_sov.model.modality import (
    ENCODERS, Banks, EncoderInput, EncoderInputs, FeatureTokens, MediaEncoding, take_records)
from megatron_sov.omni.media.banks import KINDS, BankShape, codecs_of, open_bank, read_shapes
from megatron_sov.omni.media.items import MediaVocabulary
from megatron_sov.omni.media.spectrograms import HOP_SAMPLES, SAMPLE_RATE_HZ, WINDOW_SAMPLES

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Omni:
    """The seam's other side; nothing here computes before it is asked for."""

    def read_banks(self, record: Any, where: str) -> Banks:
        return read_shapes(record, where)

    def open_banks(self, prefix: Path, banks: Banks) -> ShardRecords:
        return ShardRecords(prefix, banks)

    def check_banks(self, model: ModelConfig, banks: Mapping[str, Banks]) -> None:
        problems = [problem for source, of_source in banks.items() for kind in KINDS if kind in of_source
                    if (problem := _unread(model, of_source[kind], source))]
        if problems:
            raise UserError("; ".join(problems))

    def encoder(self, config: VisionEncoderConfig | AudioEncoderConfig, hidden_size: int) -> Any:
        from megatron_sov.omni.codecs.encoders import MediaEncoder

        return MediaEncoder(config, hidden_size)

    def feature_tokens(self, tokenizer: Tokenizer, encoding: MediaEncoding) -> FeatureTokens:
        return MediaVocabulary(tokenizer, encoding)

    def processor_files(self, model: ModelConfig, tokenizer: Path,
                        data: Iterable[str]) -> dict[str, dict[str, Any]]:
        return processor_files(model, tokenizer, codecs_of(data))


class ShardRecords:
    """The banks of one token shard."""

    def __init__(self, prefix: Path, shapes: Mapping[str, BankShape]) -> None:
        """Open the files.

        Args:
            prefix: path of the shard, without endings.
            shapes: kind -> its bank.

        Raises:
            UserError: a file is damaged or missing.
        """
        self._shapes = shapes
        self._banks = {kind: open_bank(prefix.with_name(f"{prefix.name}.{kind}"), shape)
                       for kind, shape in shapes.items()}

    def inputs(self, tokens: np.ndarray, features: np.ndarray, where: str) -> EncoderInputs:
        """Return what a stretch of the shard has for encoders, see `model.modality.BankReader`."""
        found, rest = dict[str, EncoderInput](), features != NO_FEATURE
        for kind, shape in self._shapes.items():
            mine = np.isin(tokens, shape.placeholder_ids)
            if not mine.any():
                continue
            these, bank = features[mine], self._banks[kind]
            if wrong := these[(these < 0) | (these >= len(bank) * shape.slots)][:1].tolist():
                raise UserError(f"{where} has a placeholder of {kind} for "
                                f"feature {wrong[0]}, and there are {len(bank) * shape.slots}; {DAMAGED}")
            found[kind] = take_records(np.flatnonzero(mine), these, bank, shape.slots)
            rest = rest & ~mine
        if rest.any():
            place = int(np.flatnonzero(rest)[0])
            raise UserError(f"{where} has feature {features[place]} at token id "
                            f"{tokens[place]}, which is no placeholder; {DAMAGED}")
        return found


def _unread(model: ModelConfig, bank: BankShape, source: str) -> str | None:
    """Return why a model cannot read a bank, or None."""
    name = ENCODERS[bank.kind]
    encoder = getattr(model, name)
    where = f"source {source!r} has {bank.kind}"
    if encoder is None:
        return (f"{where}, and the model has no model.{name}; take a recipe with an encoder, or pack the "
                "data without continuous media")
    if (tuple(bank.shape), bank.slots) != (encoder.record_shape, encoder.slots):
        return (f"{where} of shape {list(bank.shape)} with {bank.slots} features each, and model.{name} "
                f"reads {list(encoder.record_shape)} as {encoder.slots}; write the data "
                "for this encoder again")
    if unknown := sorted(set(bank.placeholder_ids) - set(encoder.placeholder_ids)):
        return (f"{where} at placeholders {unknown}, which are not among model.{name}.placeholder_ids = "
                f"{list(encoder.placeholder_ids)}; pack the data with the model's tokenizer")
    return None


PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
BICUBIC = 3
"""Pillow's number of this resampling."""


# What stands beside the weights of a Hugging Face folder of a model that reads or writes media: how
# pictures and sounds become the records of its encoders, in transformers' form, and which tokens stand for
# media.


def processor_files(model: ModelConfig, tokenizer: Path,
                    codecs: Mapping[str, Set[str]]) -> dict[str, dict[str, Any]]:
    """Return file -> content of what transformers' processors of pictures and sounds read; {} for a model of
    text alone.

    `processor_config.json` has a part for each processor, and under `media` what no class of transformers
    knows; `preprocessor_config.json` has the fields of both processors side by side, for older readers.

    Args:
        model: the architecture.
        tokenizer: folder whose tokenizer.json tells how ids are spelled.
        codecs: kind -> hashes of the manifests of the codecs that its data were encoded with; a kind of which
            nothing is known is left out.

    Raises:
        UserError: tokenizer.json cannot be read.
    """
    spelled = _added_tokens(tokenizer)
    parts: dict[str, dict[str, Any]] = {}
    media: dict[str, Any] = {}
    if model.vision is not None:
        parts["image_processor"] = _image_processor(model.vision)
        media["pictures"] = _placeholders(model.vision, spelled, "vision.")
    if model.audio is not None:
        if model.audio.num_frames * HOP_SAMPLES % SAMPLE_RATE_HZ == 0:  # else no class has such pieces
            parts["feature_extractor"] = _feature_extractor(model.audio)
        media["sounds"] = _placeholders(model.audio, spelled, "audio.")
    for kind, block, around in ((IMAGE, model.image_tokens, marks.DISCRETE_IMAGE),
                                (AUDIO, model.audio_tokens, marks.DISCRETE_AUDIO)):
        if block is not None:
            media[f"{kind}_tokens"] = {
                "first": block.first, "size": block.size, "first_token": marks.codebook_token(kind, 0),
                "marks": list(around),
                **({"end_of_line": marks.END_OF_LINE, "end_of_frame": marks.END_OF_FRAME,
                    "ratios": [marks.ratio_token(w, h) for w, h in marks.RATIOS]} if kind == IMAGE else {}),
                "codecs": sorted(codecs.get(kind, ()))}
    if not media:
        return {}
    flat = {name: value for part in parts.values() for name, value in part.items()}
    return {PROCESSOR: {**parts, "media": media}, **({PREPROCESSOR: flat} if flat else {})}


def _image_processor(c: VisionEncoderConfig) -> dict[str, Any]:
    """Return the fields of transformers' class of a kind of encoder, which gives pictures of its one size."""
    found: dict[str, Any] = {"do_convert_rgb": True, "do_resize": True, "resample": BICUBIC,
                             "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                             "image_mean": list(c.mean), "image_std": list(c.std)}
    if c.kind == "siglip":
        return {"image_processor_type": "SiglipImageProcessor",
                "size": {"height": c.image_size, "width": c.image_size}, **found}
    pixels = c.image_size ** 2
    return {"image_processor_type": "Qwen2VLImageProcessor", **found,
            "size": {"shortest_edge": pixels, "longest_edge": pixels}, "patch_size": c.patch_size,
            "temporal_patch_size": c.temporal_patch_size, "merge_size": c.merge_size}


def _feature_extractor(c: AudioEncoderConfig) -> dict[str, Any]:
    return {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": c.num_mels,
            "sampling_rate": SAMPLE_RATE_HZ, "hop_length": HOP_SAMPLES, "n_fft": WINDOW_SAMPLES,
            "chunk_length": c.num_frames * HOP_SAMPLES // SAMPLE_RATE_HZ, "padding_side": "right",
            "padding_value": 0.0, "return_attention_mask": False}


def _placeholders(c: VisionEncoderConfig | AudioEncoderConfig, spelled: Mapping[int, str],
                  encoder: str) -> dict[str, Any]:
    """Return what stands for features, how many a record has, and where the encoder's tensors are."""
    return {"placeholder_ids": list(c.placeholder_ids),
            "placeholders": [spelled.get(i) for i in c.placeholder_ids], "slots": c.slots,
            "record_shape": list(c.record_shape),
            "marks": ([list(marks.CONTINUOUS_IMAGE), list(marks.CONTINUOUS_VIDEO)] if encoder == "vision."
                      else [list(marks.CONTINUOUS_AUDIO)]),
            "prefixes": [prefix for name, prefix in HF_PREFIXES.items() if name.startswith(encoder)
                         and ("compressor" not in name or getattr(c, "compression", 1) > 1)]}


def _added_tokens(folder: Path) -> dict[int, str]:
    """Return how ids are spelled that a tokenizer has beside its pieces; {} where there is none."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("added_tokens") or []
        return {int(token["id"]): str(token["content"]) for token in found}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: its added tokens cannot be read ({e!r}); restore it from its "
                        "source") from None
