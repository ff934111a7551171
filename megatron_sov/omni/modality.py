"""Implementation of `model.modality.Modality`: banks, encoders, media tokens and processor files."""

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sov.base.documents.shard_files import DAMAGED, NO_FEATURE
from megatron_sov.base.errors import UserError
from megatron_sov.chat import media_tokens as marks
from megatron_sov.chat.media_tokens import AUDIO, IMAGE
from megatron_sov.chat.vocabulary import TOKENIZER_JSON, read_tokenizer
from megatron_sov.model.config import AudioEncoderConfig, ModelConfig, VisionEncoderConfig
from megatron_sov.model.families.encoders import HF_PREFIXES
from megatron_sov.model.modality import (
    ENCODERS, Banks, EncoderInput, EncoderInputs, FeatureTokens, MediaEncoding, take_records)
from megatron_sov.omni.media.banks import BANK_KINDS, BankShape, find_data_codecs, open_bank, read_bank_shapes
from megatron_sov.omni.media.items import MediaVocabulary
from megatron_sov.omni.media.spectrograms import HOP_SAMPLES, SAMPLE_RATE_HZ, WINDOW_SAMPLES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
BICUBIC = 3
"""Pillow's number for bicubic resampling."""


class OmniModality:
    """Implements `model.modality.Modality`, through which packing, training and export handle media."""

    def read_banks(self, record: Any, where: str) -> Banks:
        return read_bank_shapes(record, where)

    def open_banks(self, prefix: Path, banks: Banks) -> "ShardBankReader":
        return ShardBankReader(prefix, banks)

    def check_banks(self, model: ModelConfig, banks: Mapping[str, Banks]) -> None:
        problems = [_find_bank_problem(model, source_banks[kind], source)
                    for source, source_banks in banks.items() for kind in BANK_KINDS if kind in source_banks]
        if problems := [problem for problem in problems if problem]:
            raise UserError("; ".join(problems))

    def encoder(self, config: VisionEncoderConfig | AudioEncoderConfig, hidden_size: int) -> Any:
        from megatron_sov.omni.codecs.encoders import MediaEncoder  # imports torch; packing needs none

        return MediaEncoder(config, hidden_size)

    def feature_tokens(self, tokenizer: "Tokenizer", encoding: MediaEncoding) -> FeatureTokens:
        return MediaVocabulary(tokenizer, encoding)

    def processor_files(self, model: ModelConfig, tokenizer: Path,
                        data: Iterable[str]) -> dict[str, dict[str, Any]]:
        return build_processor_files(model, tokenizer, find_data_codecs(data))


class ShardBankReader:
    """A token shard's open banks; implements `model.modality.BankReader`."""

    def __init__(self, prefix: Path, shapes: Mapping[str, BankShape]) -> None:
        """Open the bank files.

        Args:
            prefix: path of the shard without suffix.
            shapes: kind -> bank shape.

        Raises:
            UserError: a file is damaged or missing.
        """
        self._shapes = shapes
        self._banks = {kind: open_bank(prefix.with_name(f"{prefix.name}.{kind}"), shape)
                       for kind, shape in shapes.items()}

    def inputs(self, tokens: np.ndarray, features: np.ndarray, where: str) -> EncoderInputs:
        """Return the encoder inputs for a shard range, see `model.modality.BankReader`."""
        inputs, unassigned = dict[str, EncoderInput](), features != NO_FEATURE
        for kind, shape in self._shapes.items():
            is_placeholder = np.isin(tokens, shape.placeholder_ids)
            if not is_placeholder.any():
                continue
            kind_features, bank = features[is_placeholder], self._banks[kind]
            num_features = len(bank) * shape.slots
            invalid = kind_features[(kind_features < 0) | (kind_features >= num_features)]
            if len(invalid):
                raise UserError(f"{where} has a placeholder of {kind} for feature {invalid[0]}, and there "
                                f"are {num_features}; {DAMAGED}")
            inputs[kind] = take_records(np.flatnonzero(is_placeholder), kind_features, bank, shape.slots)
            unassigned = unassigned & ~is_placeholder
        if unassigned.any():
            place = int(np.flatnonzero(unassigned)[0])
            raise UserError(f"{where} has feature {features[place]} at token id {tokens[place]}, which is "
                            f"not a placeholder; {DAMAGED}")
        return inputs


def _find_bank_problem(model: ModelConfig, bank: BankShape, source: str) -> str | None:
    """Return the reason why a model cannot read a bank, or None."""
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


def build_processor_files(model: ModelConfig, tokenizer: Path,
                          codecs: Mapping[str, Set[str]]) -> dict[str, dict[str, Any]]:
    """Return file name -> content of the processor files in a Hugging Face folder; {} for text models.

    `processor_config.json` has a section per transformers processor, and a section `media` with media tokens
    and encoder weights, which transformers ignores. `preprocessor_config.json` has the fields of all
    processors without sections, for older readers.

    Args:
        model: architecture.
        tokenizer: tokenizer folder, whose tokenizer.json has the names of placeholder ids.
        codecs: kind -> manifest hashes of the codecs that encoded the training data, if known.

    Raises:
        UserError: tokenizer.json cannot be read.
    """
    added_tokens: dict[int, str] = {}
    if (tokenizer / TOKENIZER_JSON).is_file():
        added = read_tokenizer(tokenizer).added
        added_tokens = {id_: token.get("content", "") for id_, token in added.items()}
    processors: dict[str, dict[str, Any]] = {}
    media: dict[str, Any] = {}
    if model.vision is not None:
        processors["image_processor"] = _build_image_processor(model.vision)
        media["pictures"] = _describe_encoder(model.vision, added_tokens, "vision.")
    if model.audio is not None:
        # `WhisperFeatureExtractor` only supports pieces of whole seconds.
        if model.audio.num_frames * HOP_SAMPLES % SAMPLE_RATE_HZ == 0:
            processors["feature_extractor"] = _build_feature_extractor(model.audio)
        media["sounds"] = _describe_encoder(model.audio, added_tokens, "audio.")
    for kind, block, block_marks in ((IMAGE, model.image_tokens, marks.DISCRETE_IMAGE),
                                     (AUDIO, model.audio_tokens, marks.DISCRETE_AUDIO)):
        if block is None:
            continue
        description = {"first": block.first, "size": block.size,
                       "first_token": marks.codebook_token(kind, 0), "marks": list(block_marks)}
        if kind == IMAGE:
            description |= {"end_of_line": marks.END_OF_LINE, "end_of_frame": marks.END_OF_FRAME,
                            "ratios": [marks.ratio_token(w, h) for w, h in marks.RATIOS]}
        media[f"{kind}_tokens"] = {**description, "codecs": sorted(codecs.get(kind, ()))}
    files: dict[str, dict[str, Any]] = {}
    if media:
        files[PROCESSOR] = {**processors, "media": media}
    if processors:
        files[PREPROCESSOR] = dict(item for fields in processors.values() for item in fields.items())
    return files


def _build_image_processor(c: VisionEncoderConfig) -> dict[str, Any]:
    """Return the config for the encoder's transformers image processor, at a fixed picture size."""
    fields: dict[str, Any] = {"do_convert_rgb": True, "do_resize": True, "resample": BICUBIC,
                              "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                              "image_mean": list(c.mean), "image_std": list(c.std)}
    if c.kind == "siglip":
        return {"image_processor_type": "SiglipImageProcessor",
                "size": {"height": c.image_size, "width": c.image_size}, **fields}
    pixels = c.image_size ** 2
    return {"image_processor_type": "Qwen2VLImageProcessor", **fields,
            "size": {"shortest_edge": pixels, "longest_edge": pixels}, "patch_size": c.patch_size,
            "temporal_patch_size": c.temporal_patch_size, "merge_size": c.merge_size}


def _build_feature_extractor(c: AudioEncoderConfig) -> dict[str, Any]:
    return {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": c.num_mels,
            "sampling_rate": SAMPLE_RATE_HZ, "hop_length": HOP_SAMPLES, "n_fft": WINDOW_SAMPLES,
            "chunk_length": c.num_frames * HOP_SAMPLES // SAMPLE_RATE_HZ, "padding_side": "right",
            "padding_value": 0.0, "return_attention_mask": False}


def _describe_encoder(c: VisionEncoderConfig | AudioEncoderConfig, added_tokens: Mapping[int, str],
                      prefix: str) -> dict[str, Any]:
    """Return an encoder's placeholders, features per record, marks and weight prefixes."""
    is_vision = prefix == "vision."
    block_marks = ([list(marks.CONTINUOUS_IMAGE), list(marks.CONTINUOUS_VIDEO)] if is_vision
                   else [list(marks.CONTINUOUS_AUDIO)])
    has_compressor = getattr(c, "compression", 1) > 1
    return {"placeholder_ids": list(c.placeholder_ids),
            "placeholders": [added_tokens.get(i) for i in c.placeholder_ids], "slots": c.slots,
            "record_shape": list(c.record_shape), "marks": block_marks,
            "prefixes": [hf_prefix for name, hf_prefix in HF_PREFIXES.items() if name.startswith(prefix)
                         and ("compressor" not in name or has_compressor)]}
