"""A checkpoint becomes a Hugging Face folder; memory holds two tensors of each file that is
being written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_sov.base.artifacts import FileRecord, atomic_write, manifest_sha256, refuse_existing, to_json
from megatron_sov.base.chat import media_tokens as marks
from megatron_sov.base.chat.media_tokens import AUDIO, IMAGE
from megatron_sov.base.digests import fingerprint
from megatron_sov.base.errors import UserError, warn
from megatron_sov.engine.convert import DEFAULT_WORKERS, MAX_SHARD_BYTES
from megatron_sov.engine.convert.changed_values import (
    KEEP, check_dtype_name, check_space, converted, exported_dtype)
from megatron_sov.engine.convert.copies import copies_of
from megatron_sov.engine.convert.hf_import import (
    carry, checked_source, ids_beside, split_conflict, with_turn_ends)
from megatron_sov.engine.convert.peft import add_inputs, checkpoint_weights
from megatron_sov.engine.convert.shard_writer import digest_of, plan_shards, write_files
from megatron_sov.engine.convert.sources import Weights, check_dtypes, newest_of_run
from megatron_sov.engine.mcore.checkpoint.writer import TensorSpec
from megatron_sov.model import families as models
from megatron_sov.model.config import AudioEncoderConfig, ModelConfig, VisionEncoderConfig
from megatron_sov.model.families.encoders import HF_PREFIXES
from megatron_sov.model.pretrained import CONFIG, INDEX, SINGLE_FILE
from megatron_sov.omni.media.banks import codecs_of
from megatron_sov.omni.media.spectrograms import HOP_SAMPLES, SAMPLE_RATE_HZ, WINDOW_SAMPLES
from megatron_sov.runs.checkpoints import HF_MODEL, KIND as CHECKPOINT, RUN, refuse_other_kind, settings_of
from megatron_sov.work.progress.resumable import resumable_artifact

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
BICUBIC = 3
"""Pillow's number of this resampling."""
KIND = HF_MODEL


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
                "first": block.first, "size": block.size, "first_token": marks.entry(kind, 0),
                "marks": list(around),
                **({"end_of_line": marks.END_OF_LINE, "end_of_frame": marks.END_OF_FRAME,
                    "ratios": [marks.ratio(w, h) for w, h in marks.RATIOS]} if kind == IMAGE else {}),
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


def to_hf(checkpoint: str | Path, out: str | Path, dtype: str = KEEP, *,
          max_shard_bytes: int = MAX_SHARD_BYTES, workers: int = DEFAULT_WORKERS,
          overwrite: bool = False, redo: bool = False) -> None:
    """Write a checkpoint as a Hugging Face folder (an artifact of kind "hf_model").

    Args:
        checkpoint: a checkpoint folder, written at any layout; of an adapter, whose base gets it inside.
        out: the folder to write; it appears only when complete, and a killed command goes on where it was.
        dtype: "float32", "bfloat16", "float16", "float64", or "keep" for the checkpoint's own (float32 for
            one of float64, which few readers expect); router biases are float32 always.
        max_shard_bytes: largest size of one safetensors file.
        workers: files that are written at a time.
        overwrite: replace an "hf_model" artifact that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: the checkpoint is damaged, its family cannot express its model, a value is not finite or
            overflows `dtype`, the disk is full, or other work on the output is unfinished.
    """
    _check_order(Path(checkpoint), dtype, max_shard_bytes)
    checkpoint, out = newest_of_run(Path(checkpoint)), Path(out)
    refuse_existing(out, KIND, overwrite)
    source = checkpoint_weights(checkpoint)
    check_dtypes(source)
    files = planned_files(source, dtype, max_shard_bytes)
    specs = [spec for tensors in files.values() for spec in tensors]
    of = {spec.name: spec.name for spec in specs} | copies_of(source)
    tokens = ids_beside(checkpoint / "tokenizer")
    family = models.get(source.model.family)
    config = family.to_hf_config(source.model, str(specs[0].dtype).removeprefix("torch."), tokens)
    beside = {CONFIG: config, **_processors(source, checkpoint)}
    plan = {"from": fingerprint(checkpoint), "manifest": manifest_sha256(checkpoint), "dtype": dtype,
            "max_shard_bytes": max_shard_bytes, "files": digest_of(files)}
    with resumable_artifact(out, KIND, "megatron-sov convert to-hf", plan, overwrite=overwrite,
                            redo=redo) as artifact, \
            tqdm(total=len(specs), desc="to-hf", unit="tensor", disable=None) as bar:
        missing = {name: tensors for name, tensors in files.items() if name not in artifact.finished}
        check_space(out, sum(spec.size_bytes for tensors in missing.values() for spec in tensors))
        bar.update(len(specs) - sum(map(len, missing.values())))

        def read(spec: TensorSpec) -> torch.Tensor:
            tensor = converted(source.read(of[spec.name]), spec.dtype, checkpoint, spec.name)
            bar.update()
            return tensor

        with checked_source(source, workers) as check:
            def finish(name: str, record: FileRecord) -> None:
                check.require(of[spec.name] for spec in files[name])
                artifact.finish(name, record)

            write_files(artifact.path, missing, read, workers, finish)
        _write_beside(artifact.path, files, beside)
        carry(checkpoint / "tokenizer", artifact.path, with_turn_ends(checkpoint / "tokenizer", tokens))
        add_inputs(artifact.writer, source, leaves=True)
        artifact.writer.content = {
            "family": source.model.family, "num_tensors": len(specs), "dtype": config["dtype"],
            "num_parameters": _num_parameters(spec for spec in specs if of[spec.name] == spec.name)}
        artifact.writer.settings = {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
    if conflict := split_conflict(out, family.reader_split):
        warn(conflict)


def _check_order(checkpoint: Path, dtype: str, max_shard_bytes: int) -> None:
    refuse_other_kind(checkpoint, (CHECKPOINT, RUN), "a checkpoint or a run")
    check_dtype_name(dtype)
    if max_shard_bytes <= 0:
        raise UserError(f"--max-shard-bytes {max_shard_bytes}: must be positive")


def _num_parameters(specs: Iterable[TensorSpec]) -> int:
    return sum(spec.size_bytes // spec.dtype.itemsize for spec in specs)


def planned_files(source: Weights, dtype: str, max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """Return every Hugging Face tensor that a checkpoint becomes, copies last, by the name of its file."""
    specs = {name: TensorSpec(name, shape, exported_dtype(dtype, link.fp32, source.dtype(name)))
             for link in source.links for name, shape in link.hf_shapes().items()}
    specs |= {name: replace(specs[other], name=name) for name, other in copies_of(source).items()}
    shards = plan_shards(list(specs.values()), max_shard_bytes)
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _processors(source: Weights, checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Return file -> content of what reads pictures and sounds for a model."""
    codecs = codecs_of(settings_of(checkpoint).data.paths)
    return processor_files(source.model, checkpoint / "tokenizer", codecs)


def _write_beside(folder: Path, files: dict[str, list[TensorSpec]],
                  beside: dict[str, dict[str, Any]]) -> None:
    """Write JSON files, and which file holds which tensor, where there are several."""
    for name, content in beside.items():
        atomic_write(folder / name, to_json(content))
    if SINGLE_FILE in files:
        return
    weight_map = {spec.name: name for name, tensors in files.items() for spec in tensors}
    size_bytes = sum(spec.size_bytes for tensors in files.values() for spec in tensors)
    atomic_write(folder / INDEX, to_json({"metadata": {"total_size": size_bytes},
                                          "weight_map": dict(sorted(weight_map.items()))}))
