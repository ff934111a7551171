"""A checkpoint becomes a Hugging Face folder; memory holds two tensors of each file that is
being written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from megatron_sov.base.artifacts import (
    MANIFEST, FileRecord, atomic_write, damaged_files, manifest_sha256, read_manifest, refuse_existing,
    to_json)
from megatron_sov.base.digests import fingerprint
from megatron_sov.base.errors import UserError, nearest, warn
from megatron_sov.base.figures import format_size
from megatron_sov.base.pages.markdown import CARD_MARK, md, slug
from megatron_sov.checkpoint.writer import TensorSpec
from megatron_sov.convert import DEFAULT_WORKERS, MAX_SHARD_BYTES, NO_FORMAT
from megatron_sov.convert.dtypes import KEEP, check_dtype_name, check_space, convert_tensor, exported_dtype
from megatron_sov.convert.growing import open_weights
from megatron_sov.convert.hf_import import (
    CARRIED_FIELDS, carry, check_copies, checked_source, copies_of, copy_carried_fields, differing_copies,
    digest_of, generation_ids, ids_as_list, ids_beside, move_chat_template, plan_shards, split_conflict,
    with_turn_ends, write_files)
from megatron_sov.convert.low_bit import FIELD, FORMATS, LowBitModel
from megatron_sov.convert.peft import AdaptedWeights, UpdateRounding, add_inputs
from megatron_sov.convert.sources import (
    HfWeights, Weights, check_dtypes, has_same_bits, newest_of_run, tensors_left_out)
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds
from megatron_sov.model.modality import modality
from megatron_sov.model.pretrained import (
    CONFIG, INDEX, SINGLE_FILE, listed, load_and_compare, low_bit_options)
from megatron_sov.runs.checkpoints import HF_MODEL, KIND as CHECKPOINT, RUN, refuse_other_kind, settings_of
from megatron_sov.work.progress.resumable import ResumableArtifact, resumable_artifact

# The proof of a conversion: two folders hold the same model, and transformers loads what we wrote.
#
# Every check is a number with its limit. Tensors are compared one at a time under their Hugging Face
# names, and every one leaves its checksums; where dtypes differ, both are rounded to the narrower one
# first.

@dataclass(frozen=True)
class ParityCheck:
    """One measured statement about a conversion."""

    name: str
    """What was measured."""
    value: float
    """The figure."""
    limit: float
    """Largest figure that passes."""
    passed: bool
    """Whether value <= limit."""
    detail: str = ""
    """What does not fit, if anything."""


def _count(name: str, found: list[str]) -> ParityCheck:
    return ParityCheck(name, len(found), 0, not found, listed(found))


@dataclass(frozen=True)
class TensorRecord:
    """One tensor on both sides."""

    shape: tuple[tuple[int, ...], ...]
    """Shape in A and in B."""
    dtype: tuple[str, ...]
    """Dtype in A and in B."""
    sha256: tuple[str, ...]
    """Hash of the bytes in A and in B, each in its own dtype."""
    equal: bool
    """Whether all values are the same, after rounding to the narrower dtype."""
    difference: float = 0.0
    """Largest difference of a value."""


@dataclass(frozen=True)
class Proof:
    """What a comparison found."""

    checks: list[ParityCheck]
    """Every statement, passed or not."""
    tensors: dict[str, TensorRecord]
    """Hugging Face name -> record, of all tensors that both sides have."""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify(a: str | Path, b: str | Path, *, load: bool = True, workers: int = DEFAULT_WORKERS) -> Proof:
    """Compare the weights of two models, each a checkpoint or a Hugging Face folder.

    Args:
        a: the one folder.
        b: the other.
        load: also load Hugging Face folders with transformers, which needs memory for the whole model.
        workers: tensors, and files, that are read at a time.

    Raises:
        UserError: a folder cannot be opened, or is too large to be loaded here.
    """
    sides = [open_weights(a), open_weights(b)]
    first, second = (RoundedSide(*sides), RoundedSide(*sides[::-1]))
    checks = [
        _count(f"{side.path}: files that differ from the manifest", damaged_files(side.path, workers=workers))
        for side in sides if (side.path / MANIFEST).is_file()]
    checks.append(_count("config fields that differ", _differing_fields(*sides)))
    checks.append(_count("special token ids that differ", _differing_ids(*sides)))
    records = _compare(first, second, workers)
    loss = first.rounding.describe() or second.rounding.describe()
    checks += [*_tensor_checks(sides[0], sides[1], records, loss), *first.checks(), *second.checks()]
    checks += [_count(f"{side.path}: copies that differ", differing_copies(side))
               for side in sides if isinstance(side, HfWeights) and side.copies]
    if load:
        for side in sides:
            if isinstance(side, HfWeights):
                checks += _loading_checks(side)
    return Proof(checks, records)


def _differing_fields(a: Weights, b: Weights) -> list[str]:
    """Compare what both would write into config.json, so that settings which only steer
    training do not count."""
    one, other = (models.get(side.model.family).to_hf_config(side.model, "any", TokenIds())
                  for side in (a, b))
    return [f"{name} ({one.get(name)} and {other.get(name)})"
            for name in {**one, **other} if one.get(name) != other.get(name)]


def _differing_ids(a: Weights, b: Weights) -> list[str]:
    """Compare the ids at which both begin, pad and end texts, ends of turns among them."""
    sides = []
    for side in (a, b):
        folder = side.path if isinstance(side, HfWeights) else side.path / "tokenizer"
        sides.append(vars(generation_ids(folder)))
    pairs = {name: [ids_as_list(ids[name]) for ids in sides] for name in sides[0]}
    return [f"{name} ({one} and {other})" for name, (one, other) in pairs.items() if set(one) != set(other)]


def _tensor_checks(a: Weights, b: Weights, records: dict[str, TensorRecord], loss: str) -> list[ParityCheck]:
    largest = max((record.difference for record in records.values()), default=0.0)
    return [
        _count("tensors that only one side has", sorted(set(a.names()).symmetric_difference(b.names()))),
        _count("tensors whose values differ", [name for name, record in records.items() if not record.equal]),
        ParityCheck("largest difference of a weight", largest, 0.0, largest == 0.0, loss),
    ]


class RoundedSide:
    """One side of a comparison, rounded to the other's few bits where that one has them."""

    def __init__(self, side: Weights, other: Weights) -> None:
        self.weights, self._other = side, other
        self.rounding = UpdateRounding(side)
        form = None if format_of(side) else format_of(other)
        self._low_bit = low_bit_model(side, form) if form else None
        self._errors: dict[str, float] = {}

    def read(self, name: str) -> torch.Tensor:
        tensor = self.weights.read(name)
        if self._low_bit is None or name not in self._low_bit.names:
            self.rounding.add(name, tensor, self._other.dtype(name))
            return tensor
        rounded = self._low_bit.rounded(name)
        norm = float(tensor.double().norm())
        self._errors[name] = float((rounded.double() - tensor.double()).norm()) / norm if norm else 0.0
        return rounded

    def checks(self) -> list[ParityCheck]:
        """Return how far rounding moved weights: the largest share of a weight's norm."""
        if self._low_bit is None or not self._errors:
            return []
        name, limit = max(self._errors, key=self._errors.__getitem__), self._low_bit.form.largest_error
        return [ParityCheck(f"{self.weights.path}: largest change of a weight by {self._low_bit.form.name}",
                            self._errors[name], limit, self._errors[name] <= limit, name)]


def format_of(side: Weights) -> str:
    """Return the format of weights in few bits; "" where there are none."""
    return (side.low_bit() or "") if isinstance(side, HfWeights) else ""


def _compare(a: RoundedSide, b: RoundedSide, workers: int) -> dict[str, TensorRecord]:
    """Return the record of every tensor that both sides have; `workers` tensors are in memory at a time."""
    others = set(b.weights.names())
    common = [name for name in a.weights.names() if name in others]
    with ThreadPoolExecutor(workers) as pool:
        found = tqdm(pool.map(lambda name: _record(a.read(name), b.read(name)), common), total=len(common),
                     desc="verify", unit="tensor", disable=None)
        return dict(zip(common, found, strict=True))


def _record(one: torch.Tensor, other: torch.Tensor) -> TensorRecord:
    shapes, dtypes = (tuple(one.shape), tuple(other.shape)), tuple(str(t.dtype).removeprefix("torch.")
                                                                   for t in (one, other))
    hashes = [_sha256(one)]
    if has_same_bits(one, other):
        return TensorRecord(shapes, dtypes, (hashes[0], hashes[0]), True)
    hashes.append(_sha256(other))
    one, other = _in_one_dtype(one, other)
    equal = has_same_bits(one, other)
    difference = (0.0 if equal or one.shape != other.shape
                  else float((one.double() - other.double()).abs().max()))
    return TensorRecord(shapes, dtypes, tuple(hashes), equal, difference)


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _in_one_dtype(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    narrower = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return one.to(narrower), other.to(narrower)


def _loading_checks(side: HfWeights) -> list[ParityCheck]:
    """Load with transformers as a user would, and count the keys that it reports."""
    _check_memory(side.path)
    from transformers import AutoModelForCausalLM

    try:
        _, found = load_and_compare(AutoModelForCausalLM, side.path, left_out=tensors_left_out(side.path),
                                    **{"dtype": "auto", **low_bit_options(side.path)})
    except UserError as e:
        return [ParityCheck(f"{side.path}: transformers loads it", 1, 0, False, str(e))]
    return [_count(f"{side.path}: transformers reports keys {kind}", names) for kind, names in found.items()]


def _check_memory(path: Path) -> None:
    needed_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    free_bytes = psutil.virtual_memory().available
    if needed_bytes > free_bytes:
        raise UserError(f"{path}: loading takes {format_size(needed_bytes)} of memory, but "
                        f"{format_size(free_bytes)} "
                        "are free; pass --no-load to compare the files alone")


KIND = HF_MODEL
README = "README.md"


def to_hf(checkpoint: str | Path, out: str | Path, dtype: str = KEEP, *,
          quantize: str = NO_FORMAT, max_shard_bytes: int = MAX_SHARD_BYTES,
          workers: int = DEFAULT_WORKERS, overwrite: bool = False, redo: bool = False) -> None:
    """Write a checkpoint as a Hugging Face folder (an artifact of kind "hf_model").

    Args:
        checkpoint: a checkpoint folder, written at any layout; of an adapter, whose base gets it inside. With
            `quantize` also a Hugging Face folder.
        out: the folder to write; it appears only when complete, and a killed command goes on where it was.
        dtype: "float32", "bfloat16", "float16", "float64", or "keep" for the checkpoint's own (float32 for
            float64, which few readers expect, and for an adapter's); router biases are float32 always.
        quantize: store linear layers in a format of few bits (`convert.low_bit`), or "none"; "keep" is
            bfloat16 then.
        max_shard_bytes: largest size of one safetensors file.
        workers: files that are written at a time.
        overwrite: replace an "hf_model" artifact that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: the checkpoint is damaged, its family cannot express its model, a value is not finite or
            overflows `dtype`, the disk is full, or other work on the output is unfinished.
    """
    _check_order(Path(checkpoint), dtype, max_shard_bytes, quantize)
    checkpoint, out = newest_of_run(Path(checkpoint)), Path(out)
    refuse_existing(out, KIND, overwrite)
    source = open_weights(checkpoint)
    check_dtypes(source)
    low_bit = low_bit_model(source, quantize)
    if low_bit is not None and dtype == KEEP:
        dtype = "bfloat16"  # as readers make of few bits, and transformers' classes want one dtype
    copies = copies_of(source)
    specs = planned_tensors(source, dtype, copies)
    files = planned_files(specs, low_bit, max_shard_bytes)
    of = {part.name: spec.name for spec in specs for part in _parts(spec, low_bit)} | copies
    companions, tokens = _companions(source)
    family = models.get(source.model.family)
    written_dtype = str(specs[0].dtype).removeprefix("torch.")
    config = _carried_fields(source) | family.to_hf_config(source.model, written_dtype, tokens)
    if low_bit is not None:
        config[FIELD] = low_bit.field()
    beside = {CONFIG: config, **_processors(source, checkpoint)}
    form = {"quantize": quantize} if low_bit is not None else {}
    settings = {"dtype": dtype, "max_shard_bytes": max_shard_bytes, **form}
    has_manifest = (checkpoint / MANIFEST).is_file()  # all but folders of others
    plan = {"from": fingerprint(checkpoint), "manifest": manifest_sha256(checkpoint) if has_manifest else "",
            **settings, "files": digest_of(files)}
    with resumable_artifact(out, KIND, "megatron-sov convert to-hf", plan, overwrite=overwrite,
                            redo=redo) as artifact:
        _write_tensors(artifact, source, low_bit, files, of, workers)
        _write_beside(artifact.path, files, beside, companions, tokens)
        if has_manifest:
            add_inputs(artifact.writer, source, leaves=True)
        artifact.writer.content = {
            "family": source.model.family, "num_tensors": sum(map(len, files.values())),
            "dtype": config["dtype"],
            "num_parameters": sum(math.prod(spec.shape) for spec in specs if spec.name not in copies), **form}
        artifact.writer.settings = settings
    _write_readme(out)
    if conflict := split_conflict(out, family.reader_split):
        warn(conflict)


def _write_tensors(artifact: ResumableArtifact, source: Weights, low_bit: LowBitModel | None,
                   files: dict[str, list[TensorSpec]], of: dict[str, str], workers: int) -> None:
    """Write the files that are not finished; `of` names the source's tensor of each that is written."""
    num_tensors = sum(map(len, files.values()))
    missing = {name: tensors for name, tensors in files.items() if name not in artifact.finished}
    check_space(artifact.path, sum(spec.size_bytes for tensors in missing.values() for spec in tensors))
    rounding = UpdateRounding(source)
    with tqdm(total=num_tensors, desc="to-hf", unit="tensor", disable=None) as bar:
        bar.update(num_tensors - sum(map(len, missing.values())))

        def read(spec: TensorSpec) -> torch.Tensor:
            name = of[spec.name]
            if low_bit is not None and name in low_bit.names:
                tensor = low_bit.stored(name)[spec.name.removeprefix(name)]
            else:
                whole = source.read(name)
                tensor = convert_tensor(whole, spec.dtype, source.path, spec.name)
                rounding.add(name, whole, spec.dtype)
            bar.update()
            return tensor

        with checked_source(source, workers) as check:
            def finish(name: str, record: FileRecord) -> None:
                check.require(of[spec.name] for spec in files[name])
                artifact.finish(name, record)

            write_files(artifact.path, missing, read, workers, finish)
    if loss := rounding.describe():
        warn(f"{source.path}: {loss}; --dtype float32 writes the model that was trained")


def low_bit_model(source: Weights, quantize: str) -> LowBitModel | None:
    """Return a model's weights as `quantize` stores them; None for "none".

    Raises:
        UserError: the format cannot hold the model, or the source is in few bits itself, or is the text model
            inside of one that sees.
    """
    if quantize == NO_FORMAT:
        return None
    if isinstance(source, HfWeights) and (form := source.low_bit()) is not None:
        raise UserError(f"{source.path}: is in {form} already, and --quantize {quantize} would round its "
                        "rounded weights; take the model that it was made from")
    if isinstance(source, HfWeights) and source.left_out:
        raise UserError(f"{source.path}: has {len(source.left_out)} tensors of what sees pictures, which "
                        "would be left out; convert it with from-hf first")
    own = any(FIELD in item.names for item in models.get(source.model.family).config)
    return LowBitModel(source, quantize, own)


def _carried_fields(source: Weights) -> dict[str, Any]:
    """Return the fields of config.json that a source was imported with and that say nothing of our model."""
    if isinstance(source, HfWeights):
        return source.carried
    if isinstance(source, AdaptedWeights):
        return _carried_fields(source.base)
    return dict(copy_carried_fields(source.path).get(CARRIED_FIELDS, {}))


def _companions(source: Weights) -> tuple[Path, TokenIds]:
    """Return where a source's tokenizer is, and the ids of its special tokens."""
    if isinstance(source, HfWeights):
        check_copies(source)
        return source.path, ids_beside(source.path)
    return source.path / "tokenizer", ids_beside(source.path / "tokenizer")


def _write_readme(export: Path) -> None:
    """Write a short model card, which `megatron-sov card` replaces by a whole one; outside of the manifest,
    since people change it."""
    # without the folder's name: the same model gives the same bytes
    content = read_manifest(export).content
    form = content.get("quantize", content["dtype"])
    atomic_write(export / README, f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- {slug(CARD_MARK)}
---

# {md(content["family"])} model

{content["num_parameters"]:,} parameters in {form}, trained with megatron-sov.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```

`megatron-sov card` writes a card with data, training and scores.
""".encode())


def _check_order(checkpoint: Path, dtype: str, max_shard_bytes: int, quantize: str) -> None:
    if quantize == NO_FORMAT:
        refuse_other_kind(checkpoint, (CHECKPOINT, RUN), "a checkpoint or a run")
    elif quantize not in FORMATS:
        raise UserError(f"--quantize {quantize!r}: does not exist{nearest(quantize, FORMATS)} (formats: "
                        f"{', '.join(FORMATS)}, {NO_FORMAT})")
    else:
        refuse_other_kind(checkpoint, (CHECKPOINT, RUN, HF_MODEL),
                          "a checkpoint, a run or a Hugging Face folder")
    check_dtype_name(dtype)
    if max_shard_bytes <= 0:
        raise UserError(f"--max-shard-bytes {max_shard_bytes}: must be positive")


def planned_tensors(source: Weights, dtype: str, copies: Mapping[str, str]) -> list[TensorSpec]:
    """Return every Hugging Face tensor that a checkpoint becomes, copies last."""
    specs = {name: TensorSpec(name, shape, exported_dtype(dtype, link.fp32, source.dtype(name)))
             for link in source.links for name, shape in link.hf_shapes().items()}
    specs |= {name: replace(specs[other], name=name) for name, other in copies.items()}
    return list(specs.values())


def _parts(spec: TensorSpec, low_bit: LowBitModel | None) -> list[TensorSpec]:
    return [spec] if low_bit is None else low_bit.specs(spec)


def planned_files(specs: list[TensorSpec], low_bit: LowBitModel | None,
                  max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """Return what is written, by the name of its file."""
    shards = plan_shards([part for spec in specs for part in _parts(spec, low_bit)], max_shard_bytes)
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _processors(source: Weights, checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Return file -> content of what reads pictures and sounds for a model; {} for a model of text."""
    if not source.model.is_multimodal:
        return {}
    return modality().processor_files(source.model, checkpoint / "tokenizer",
                                      settings_of(checkpoint).data.paths)


def _write_beside(folder: Path, files: dict[str, list[TensorSpec]], beside: dict[str, dict[str, Any]],
                  tokenizer: Path, tokens: TokenIds) -> None:
    """Write tokenizer, template and JSON files, and which file holds which tensor where there are several."""
    carry(tokenizer, folder, with_turn_ends(tokenizer, tokens))
    move_chat_template(folder)
    for name, content in beside.items():
        atomic_write(folder / name, to_json(content))
    if SINGLE_FILE in files:
        return
    weight_map = {spec.name: name for name, tensors in files.items() for spec in tensors}
    size_bytes = sum(spec.size_bytes for tensors in files.values() for spec in tensors)
    atomic_write(folder / INDEX, to_json({"metadata": {"total_size": size_bytes},
                                          "weight_map": dict(sorted(weight_map.items()))}))
