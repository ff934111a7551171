"""Export a checkpoint as a Hugging Face folder; memory holds two tensors per file being written."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from megatron_sov.base.artifacts import (
    MANIFEST, check_output_folder, find_damaged_files, format_json, manifest_sha256, read_manifest,
    trace_origins, write_atomically)
from megatron_sov.base.digests import fingerprint_folder
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.figures import format_size
from megatron_sov.base.pages.markdown import escape_md
from megatron_sov.checkpoint.safetensors_files import TensorSpec
from megatron_sov.convert import DEFAULT_WORKERS, MAX_SHARD_BYTES
from megatron_sov.convert.companion_files import (
    CARRIED_FIELDS, add_turn_ends, copy_carried_fields, copy_companions, describe_split_conflict,
    move_chat_template, read_generation_ids, read_token_ids, to_id_list)
from megatron_sov.convert.dtypes import KEEP, check_dtype_name, choose_export_dtype, convert_tensor
from megatron_sov.convert.hf_import import (
    find_differing_copies, get_duplicates, hash_file_plan, plan_shards, write_unfinished)
from megatron_sov.convert.peft import AdaptedWeights, UpdateRounding, open_weights, record_inputs
from megatron_sov.convert.sources import (
    HfWeights, Weights, check_dtypes, has_same_bits, list_ignored_prefixes, resolve_run)
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds
from megatron_sov.model.modality import load_modality
from megatron_sov.model.objectives import BUILT_IN
from megatron_sov.model.pretrained import (
    CONFIG, INDEX, SINGLE_FILE, find_low_bit_options, format_names, load_and_compare)
from megatron_sov.runs.checkpoints import (
    CHECKPOINT_KIND as CHECKPOINT, HF_MODEL, RUN, check_folder_kind, read_checkpoint_settings)
from megatron_sov.version import __version__
from megatron_sov.work.progress.resumable import ResumableArtifact, resumable_artifact

KIND = HF_MODEL
README = "README.md"


# Verification: two folders hold the same model, and transformers loads an export. Tensors are compared one at
# a time under their Hugging Face names; if dtypes differ, both tensors are rounded to the narrower dtype.
@dataclass(frozen=True)
class ParityCheck:
    """A measured property of a conversion, with a limit."""

    name: str
    """Measure name."""
    value: float
    """Measured value."""
    limit: float
    """Largest passing value."""
    passed: bool
    """`value <= limit`."""
    detail: str = ""
    """Names of differing tensors or fields."""


def _check_none(name: str, items: list[str]) -> ParityCheck:
    return ParityCheck(name, len(items), 0, not items, format_names(items))


@dataclass(frozen=True)
class TensorRecord:
    """A tensor compared between models A and B."""

    shape: tuple[tuple[int, ...], ...]
    """Shapes in A and B."""
    dtype: tuple[str, ...]
    """Dtypes in A and B."""
    sha256: tuple[str, ...]
    """Byte hashes in A and B, in each model's dtype."""
    equal: bool
    """Whether the values are equal after rounding to the narrower dtype."""
    difference: float = 0.0
    """Largest absolute difference."""


@dataclass(frozen=True)
class ConversionProof:
    """Checks and tensor comparisons between two models."""

    checks: list[ParityCheck]
    """Passed and failed checks."""
    tensors: dict[str, TensorRecord]
    """Hugging Face name -> record, for tensors in both models."""

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify(a: str | Path, b: str | Path, *, load: bool = True,
           workers: int = DEFAULT_WORKERS) -> ConversionProof:
    """Compare two models' weights; each model is a checkpoint or a Hugging Face folder.

    `load`: also load Hugging Face folders with transformers, which needs memory for a whole model; `workers`:
    tensors, and files, read at a time. Raises `UserError`: a folder cannot be opened, or the model does not
    fit into free memory.
    """
    sides = [open_weights(a), open_weights(b)]
    first, second = (UpdateRounding(side) for side in sides)
    checks = [
        _check_none(f"{side.path}: files that differ from the manifest",
                    find_damaged_files(side.path, workers=workers))
        for side in sides if (side.path / MANIFEST).is_file()]
    checks.append(_check_none("config fields that differ", _list_differing_fields(*sides)))
    checks.append(_check_none("special token ids that differ", _list_differing_ids(*sides)))
    records = _compare_all(sides, (first, second), workers)
    checks += _check_tensors(sides[0], sides[1], records, first.format_loss() or second.format_loss())
    checks += [_check_none(f"{side.path}: copies that differ", find_differing_copies(side))
               for side in sides if isinstance(side, HfWeights) and side.copies]
    if load:
        for side in sides:
            if isinstance(side, HfWeights):
                checks += _check_loading(side)
    return ConversionProof(checks, records)


def _list_differing_fields(a: Weights, b: Weights) -> list[str]:
    """Compare both models' config.json; training-only settings do not count."""
    a_config, b_config = (models.get_family(side.model.family).to_hf_config(side.model, "any", TokenIds())
                          for side in (a, b))
    return [f"{name} ({a_config.get(name)} and {b_config.get(name)})"
            for name in {**a_config, **b_config} if a_config.get(name) != b_config.get(name)]


def _list_differing_ids(a: Weights, b: Weights) -> list[str]:
    """Compare both models' bos, eos and pad ids, with the turn ends."""
    sides = []
    for side in (a, b):
        folder = side.path if isinstance(side, HfWeights) else side.path / "tokenizer"
        sides.append(vars(read_generation_ids(folder)))
    pairs = {name: [to_id_list(ids[name]) for ids in sides] for name in sides[0]}
    return [f"{name} ({a_ids} and {b_ids})" for name, (a_ids, b_ids) in pairs.items()
            if set(a_ids) != set(b_ids)]


def _check_tensors(a: Weights, b: Weights, records: dict[str, TensorRecord], loss: str) -> list[ParityCheck]:
    largest = max((record.difference for record in records.values()), default=0.0)
    return [
        _check_none("tensors that only one side has",
                    sorted(set(a.list_names()).symmetric_difference(b.list_names()))),
        _check_none("tensors whose values differ",
                    [name for name, record in records.items() if not record.equal]),
        ParityCheck("largest difference of a weight", largest, 0.0, largest == 0.0, loss)]


def _compare_all(sides: Sequence[Weights], roundings: Sequence[UpdateRounding],
                 workers: int) -> dict[str, TensorRecord]:
    """Return a record for each tensor in both models; `workers` tensors are in memory at a time."""
    a, b = sides
    b_names = set(b.list_names())
    common = [name for name in a.list_names() if name in b_names]

    def compare_tensor(name: str) -> TensorRecord:
        a_tensor, b_tensor = a.read(name), b.read(name)
        roundings[0].measure_weight(name, a_tensor, b.get_dtype(name))
        roundings[1].measure_weight(name, b_tensor, a.get_dtype(name))
        return _compare_tensors(a_tensor, b_tensor)

    with ThreadPoolExecutor(workers) as pool:
        records = tqdm(pool.map(compare_tensor, common), total=len(common), desc="verify", unit="tensor",
                       disable=None)
        return dict(zip(common, records, strict=True))


def _compare_tensors(a: torch.Tensor, b: torch.Tensor) -> TensorRecord:
    shapes = tuple(a.shape), tuple(b.shape)
    dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in (a, b))
    hashes = [_hash_tensor(a)]
    if has_same_bits(a, b):
        return TensorRecord(shapes, dtypes, (hashes[0], hashes[0]), True)
    hashes.append(_hash_tensor(b))
    narrower = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    a, b = a.to(narrower), b.to(narrower)
    equal = has_same_bits(a, b)
    difference = 0.0 if equal or a.shape != b.shape else float((a.double() - b.double()).abs().max())
    return TensorRecord(shapes, dtypes, tuple(hashes), equal, difference)


def _hash_tensor(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _check_loading(side: HfWeights) -> list[ParityCheck]:
    """Load the folder with transformers, and check the reported keys."""
    from transformers import AutoModelForCausalLM  # slow to import, and few exports are loaded

    needed_bytes = sum(file.stat().st_size for file in side.path.glob("*.safetensors"))
    free_bytes = psutil.virtual_memory().available
    if needed_bytes > free_bytes:
        raise UserError(f"{side.path}: loading takes {format_size(needed_bytes)} of memory, but "
                        f"{format_size(free_bytes)} are free; pass --no-load to compare files only")
    try:
        _, keys = load_and_compare(AutoModelForCausalLM, side.path, left_out=list_ignored_prefixes(side.path),
                                   **{"dtype": "auto", **find_low_bit_options(side.path)})
    except UserError as e:
        return [ParityCheck(f"{side.path}: transformers loads it", 1, 0, False, str(e))]
    return [_check_none(f"{side.path}: transformers reports keys {kind}", names)
            for kind, names in keys.items()]


def to_hf(checkpoint: str | Path, out: str | Path, dtype: str = KEEP, *,
          max_shard_bytes: int = MAX_SHARD_BYTES, workers: int = DEFAULT_WORKERS, overwrite: bool = False,
          redo: bool = False) -> None:
    """Write a checkpoint as a Hugging Face folder (artifact kind `hf_model`).

    Args:
        checkpoint: checkpoint of any layout; an adapter is merged into its base.
        out: folder to write. It appears when complete; a killed command continues where it stopped.
        dtype: "float32", "bfloat16", "float16", "float64" or "keep" (float32 for float64 tensors, which few
            programs read, and the merged dtype for adapters); router biases are always float32.
        max_shard_bytes: largest size of a safetensors file.
        workers: files written at a time.
        overwrite: replace an existing `hf_model` artifact.
        redo: start over if unfinished work with other arguments exists.

    Raises:
        UserError: the checkpoint is damaged, the family cannot express the model, a value is not finite or
            overflows `dtype`, the disk is full, or other work on `out` is unfinished.
    """
    check_folder_kind(Path(checkpoint), (CHECKPOINT, RUN), "a checkpoint or a run")
    check_dtype_name(dtype)
    checkpoint, out = resolve_run(Path(checkpoint)), Path(out)
    check_output_folder(out, KIND, overwrite)
    source = open_weights(checkpoint)
    check_dtypes(source)
    copies = get_duplicates(source)
    specs = plan_tensors(source, dtype, copies)
    files = plan_export_files(specs, max_shard_bytes)
    source_names = {spec.name: spec.name for spec in specs} | copies
    tokenizer = checkpoint / "tokenizer"
    tokens = read_token_ids(tokenizer)
    family = models.get_family(source.model.family)
    written_dtype = str(specs[0].dtype).removeprefix("torch.")
    imported = source.base.path if isinstance(source, AdaptedWeights) else checkpoint
    carried_fields = copy_carried_fields(imported).get(CARRIED_FIELDS, {})
    config = carried_fields | family.to_hf_config(source.model, written_dtype, tokens)
    json_files = {CONFIG: config, **_build_processors(source, checkpoint)}
    settings = {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
    plan = {"from": fingerprint_folder(checkpoint), "manifest": manifest_sha256(checkpoint), **settings,
            "files": hash_file_plan(files)}
    with resumable_artifact(out, KIND, "megatron-sov convert to-hf", plan, overwrite=overwrite,
                            redo=redo) as artifact:
        _write_tensors(artifact, source, files, source_names, workers)
        _write_companions(artifact.path, files, json_files, tokenizer, tokens)
        record_inputs(artifact.writer, source, for_export=True)
        artifact.writer.content = {
            "family": source.model.family, "num_tensors": sum(map(len, files.values())),
            "dtype": config["dtype"],
            "num_parameters": sum(math.prod(spec.shape) for spec in specs if spec.name not in copies)}
        artifact.writer.settings = settings
    _write_readme(out, checkpoint)
    if conflict := describe_split_conflict(out, family.reader_split):
        warn(conflict)


def _write_tensors(artifact: ResumableArtifact, source: Weights, files: dict[str, list[TensorSpec]],
                   source_names: dict[str, str], workers: int) -> None:
    """Write the unfinished files; `source_names`: exported name -> name in the source."""
    rounding = UpdateRounding(source)

    def read(spec: TensorSpec) -> torch.Tensor:
        name = source_names[spec.name]
        source_tensor = source.read(name)
        tensor = convert_tensor(source_tensor, spec.dtype, source.path, spec.name)
        rounding.measure_weight(name, source_tensor, spec.dtype)
        return tensor

    write_unfinished(artifact, files, read=read, sources=[source],
                     list_source_names=lambda spec: [source_names[spec.name]], label="to-hf", workers=workers)
    if loss := rounding.format_loss():
        warn(f"{source.path}: {loss}; pass --dtype float32 to keep the trained values")


def _write_readme(export: Path, source: Path) -> None:
    """Write a model card with the provenance of `source`; the manifest excludes it, because users edit it."""
    from huggingface_hub import ModelCard, ModelCardData  # slow to import

    # Folder names are left out: the same model must give the same bytes.
    content = read_manifest(export).content
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["megatron-sov"])
    title = escape_md(content["family"])
    lines = [f"{content['num_parameters']:,} parameters in {content['dtype']}, trained with megatron-sov "
             f"{__version__}.", "", "```python",
             "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
             'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
             'model = AutoModelForCausalLM.from_pretrained("FOLDER")', "```"]
    if (source / MANIFEST).is_file():
        lines += ["", "## Provenance", "", *_iter_provenance(source)]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title} model\n\n" + "\n".join(lines) + "\n")
    write_atomically(export / README, str(card).encode())


def _iter_provenance(source: Path) -> Iterator[str]:
    """Yield Markdown list items: recipe, stage and step of a checkpoint, and artifacts in its provenance."""
    manifest = read_manifest(source)
    settings = manifest.settings
    objective = settings.get("objective")
    stage = BUILT_IN.get(objective.get("name", "") if isinstance(objective, dict) else "", "pretrain")
    yield f"- recipe {escape_md(str(settings.get('recipe', 'unknown')))}, stage {escape_md(stage)}"
    counts = [f"{name} {manifest.content[name]:,}" for name in ("step", "tokens")
              if type(manifest.content.get(name)) is int]
    yield f"- checkpoint {manifest_sha256(source)[:16]}" + (f": {', '.join(counts)}" if counts else "")
    queue = [(1, origin) for origin in trace_origins(source, manifest)]
    while queue:
        depth, origin = queue.pop(0)
        indent = "  " * depth
        yield f"{indent}- made from {escape_md(origin['kind'])} {origin['manifest_sha256'][:16]}"
        queue = [(depth + 1, parent) for parent in origin["made_from"]] + queue
        if origin["kind"] == "tokens" and origin["state"] == "here":
            for part in read_manifest(origin["path"]).content.get("sources", []):
                split = part["splits"]["train"]
                yield (f"{indent}  - source {escape_md(part['name'])}: {split['num_documents']:,} documents, "
                       f"{split['num_tokens']:,} tokens")


def plan_tensors(source: Weights, dtype: str, copies: Mapping[str, str]) -> list[TensorSpec]:
    """Return the tensors to export; duplicated tensors come last."""
    specs = {name: TensorSpec(name, shape, choose_export_dtype(dtype, link.fp32, source.get_dtype(name)))
             for link in source.links for name, shape in link.hf_shapes().items()}
    specs |= {name: replace(specs[original], name=name) for name, original in copies.items()}
    return list(specs.values())


def plan_export_files(specs: list[TensorSpec], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """Return file name -> tensors."""
    shards = plan_shards(specs, max_shard_bytes)
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _build_processors(source: Weights, checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Return file name -> processor config for multimodal models; {} for text models."""
    if not source.model.is_multimodal:
        return {}
    return load_modality().processor_files(source.model, checkpoint / "tokenizer",
                                           read_checkpoint_settings(checkpoint).data.paths)


def _write_companions(folder: Path, files: dict[str, list[TensorSpec]], json_files: dict[str, dict[str, Any]],
                      tokenizer: Path, tokens: TokenIds) -> None:
    """Write tokenizer, chat template, JSON files and, for several shards, the tensor index."""
    copy_companions(tokenizer, folder, add_turn_ends(tokenizer, tokens))
    move_chat_template(folder)
    for name, content in json_files.items():
        write_atomically(folder / name, format_json(content))
    if SINGLE_FILE in files:
        return
    weight_map = {spec.name: name for name, tensors in files.items() for spec in tensors}
    size_bytes = sum(spec.size_bytes for tensors in files.values() for spec in tensors)
    write_atomically(folder / INDEX, format_json({"metadata": {"total_size": size_bytes},
                                                  "weight_map": dict(sorted(weight_map.items()))}))
