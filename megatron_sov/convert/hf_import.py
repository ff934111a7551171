"""Import a Hugging Face folder as a checkpoint; memory holds two blocks per file being written."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_sov.base.artifacts import (
    MANIFEST, FileRecord, check_output_folder, find_file_damage, format_json, read_manifest, write_atomically)
from megatron_sov.base.digests import SHA256, fingerprint_folder
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.outputs import refuse_outside_link
from megatron_sov.checkpoint.safetensors_files import TensorSource, TensorSpec, write_tensors
from megatron_sov.checkpoint.sharded_tensors import (
    MAX_FILE_BYTES, Index, add_index_entry, format_block_name, format_file_name, write_index)
from megatron_sov.checkpoint.stored_tensors import StoredBlock
from megatron_sov.convert import DEFAULT_WORKERS
from megatron_sov.convert.companion_files import (
    CARRIED_FIELDS, TOKENIZER_FILES, copy_companions, read_optional_json, read_token_ids)
from megatron_sov.convert.dtypes import KEEP, check_dtype_name, check_space, choose_dtype, convert_tensor
from megatron_sov.convert.peft import AdaptedWeights
from megatron_sov.convert.sources import PART, HfWeights, Weights, check_dtypes, has_same_bits
from megatron_sov.model.config import RunConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import CONFIG, DAMAGED_HF, find_hub_name, format_names, read_json
from megatron_sov.runs.checkpoints import (
    ADAPTER, CHECKPOINT_KIND, HF_MODEL, IMPORTED_RECIPE, OPTIMIZER, SOURCE, STATE_FILE, check_folder_kind,
    check_model_path, suggest_replacement)
from megatron_sov.work.progress.resumable import ResumableArtifact, resumable_artifact

INTEGRITY = "integrity.json"
"""Megatron-Core's file hashes, for `dist_checkpointing.load(..., verify_integrity=True)`."""


# Duplicated tensors: Hugging Face folders store embedding and head of a prediction layer a second time. A
# checkpoint stores each once.
def get_duplicates(weights: Weights) -> dict[str, str]:
    """Return name -> original for tensors that an export stores twice."""
    return models.get_family(weights.model.family).find_copies(weights.model)


def find_differing_copies(folder: HfWeights) -> list[str]:
    """Return duplicated tensors in `folder` that differ from the original in a bit or dtype."""
    return [name for name, original in folder.copies.items()
            if not has_same_bits(folder.read(name), folder.read(original))]


def check_copies(folder: HfWeights) -> None:
    """Raise `UserError` if a duplicated tensor differs: our models share embedding and head."""
    if differing := find_differing_copies(folder):
        name = differing[0]
        raise UserError(f"{folder.path}: {name} differs from {folder.copies[name]}, but a prediction layer "
                        "has no embedding or head of its own here; save the model with equal tensors")


# Safetensors files, several at a time; memory holds two tensors per file.
def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Divide tensors, in order, into files of at most `max_shard_bytes`; a larger tensor has its own file."""
    shards: list[list[TensorSpec]] = [[]]
    filled_bytes = 0
    for spec in specs:
        if shards[-1] and filled_bytes + spec.size_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(spec)
        filled_bytes += spec.size_bytes
    return shards


def hash_file_plan(files: Mapping[str, list[TensorSpec]]) -> str:
    """Hash the tensor names per file, to recognize an unfinished conversion with the same plan."""
    names = json.dumps([[file, [spec.name for spec in specs]] for file, specs in files.items()])
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def write_files(folder: Path, files: dict[str, list[TensorSpec]], read: TensorSource, workers: int,
                finish: Callable[[str, FileRecord], None]) -> None:
    """Write `files` (name -> tensors, see `plan_shards`) into `folder`, `workers` at a time, each with a
    thread that reads and a thread that hashes and writes; the order of writing changes no byte. `finish` is
    called with the name and record of each completed file. Raises `UserError`: the first error of `read`;
    further files are not started."""
    def write_one(name: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(1) as reader:
            record = write_tensors(path, files[name], read, reader)
        finish(name, record)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a thread per file
    pool = ThreadPoolExecutor(workers)
    try:
        for future in as_completed([pool.submit(write_one, name) for name in files]):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


# Source files are hashed during the conversion. A written file counts as finished only after the file's
# sources are verified, and the artifact is published only after every source file is verified.
@contextlib.contextmanager
def verify_source(weights: Weights, workers: int) -> Iterator[Callable[[Iterable[str]], None]]:
    """Verify source files (model part only) against the manifest during the `with` block, `workers` at a
    time.

    Yields a function that waits until the files of the given Hugging Face tensors are verified. Raises
    `UserError`: a file is missing or differs from the manifest; the message lists its tensors, and replaces
    an error of the block, which may be a consequence of the damage.
    """
    path, remedy = weights.path, DAMAGED_HF
    records: Mapping[str, FileRecord] = {}
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        other_parts = tuple(f"{part}/" for part in manifest.content.get("parts", [])
                            if part not in (PART, ADAPTER))
        records = {name: record for name, record in manifest.files.items()
                   if not name.startswith(other_parts)}
        remedy = suggest_replacement(path) if manifest.kind == CHECKPOINT_KIND else DAMAGED_HF
    elif (path / INTEGRITY).is_file():
        records = _read_integrity(path)
    with contextlib.ExitStack() as stack:
        wait_for_base = None
        if isinstance(weights, AdaptedWeights):
            wait_for_base = stack.enter_context(verify_source(weights.base, workers))
        pool = ThreadPoolExecutor(workers)
        stack.callback(pool.shutdown, cancel_futures=True)
        damage = {name: pool.submit(find_file_damage, path / name, record)
                  for name, record in records.items()}

        def refuse_damage(files: Iterable[str]) -> None:
            for file in files:
                if problem := damage[file].result():
                    names = weights.list_keys_in(file)
                    holds = f" (it holds {format_names(names)})" if names else ""
                    raise UserError(f"{problem}{holds}; {remedy}")

        def wait_for(names: Iterable[str]) -> None:
            names = list(names)
            if wait_for_base is not None:
                wait_for_base(names)
            if damage:
                refuse_damage(sorted({file for name in names for file in weights.list_files(name)}
                                     & damage.keys()))

        try:
            yield wait_for
        # a damaged file may have caused the exception, and the damage message names the remedy
        except Exception:
            refuse_damage(damage)
            raise
        refuse_damage(damage)


def _read_integrity(folder: Path) -> dict[str, FileRecord]:
    """Return `torch_dist` file -> record. Raises `UserError`: `INTEGRITY` lacks or adds a tensor file."""
    sizes_bytes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    tensor_files = {name for name in sizes_bytes if name.endswith(".distcp")}
    digests = read_json(folder / INTEGRITY).get("files") if tensor_files else {}
    if not isinstance(digests, dict) or not tensor_files <= digests.keys() <= sizes_bytes.keys():
        raise UserError(f"{folder / INTEGRITY}: must list the hash of each file in its folder; {DAMAGED_HF}")
    return {name: FileRecord(f"{SHA256}:{digest}", sizes_bytes[name]) for name, digest in digests.items()}


def write_unfinished(artifact: ResumableArtifact, files: dict[str, list[TensorSpec]], read: TensorSource,
                     sources: Sequence[Weights], list_source_names: Callable[[TensorSpec], Iterable[str]],
                     label: str, workers: int) -> None:
    """Write an artifact's unfinished files (name -> tensors, see `plan_shards`), `workers` at a time, with a
    progress bar, and verify the source files meanwhile.

    `sources`: weights from which `read` computes a tensor; `list_source_names`: returns the Hugging Face
    names of the tensors from which it does. Raises `UserError`: a source file is damaged, `read` fails, or
    the disk is full.
    """
    missing = {name: specs for name, specs in files.items() if name not in artifact.finished}
    check_space(artifact.path, sum(spec.size_bytes for specs in missing.values() for spec in specs))
    num_tensors = sum(map(len, files.values()))
    num_written = num_tensors - sum(map(len, missing.values()))
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=num_tensors, initial=num_written, desc=label, unit="tensor",
                                       disable=None))
        checks = [stack.enter_context(verify_source(source, workers)) for source in sources]

        def read_and_count(spec: TensorSpec) -> torch.Tensor:
            tensor = read(spec)
            bar.update()
            return tensor

        def finish(name: str, record: FileRecord) -> None:
            # verify the sources before the file counts as finished: a resumed command trusts finished files
            for wait_for in checks:
                wait_for(source_name for spec in files[name] for source_name in list_source_names(spec))
            artifact.finish(name, record)

        write_files(artifact.path, missing, read_and_count, workers, finish)


def from_hf(hf_dir: str | Path, out: str | Path, dtype: str = KEEP, *, workers: int = DEFAULT_WORKERS,
            overwrite: bool = False, redo: bool = False) -> list[str]:
    """Write a Hugging Face folder as a checkpoint (part `model`, step 0), and return the warnings.

    Args:
        hf_dir: folder with config.json and safetensors files.
        out: checkpoint to write. It appears when complete; a killed command continues where it stopped.
        dtype: "float32", "bfloat16", "float16", "float64" or "keep"; router biases are always float32.
        workers: files written at a time.
        overwrite: replace an existing checkpoint.
        redo: start over if unfinished work with other arguments exists.

    Raises:
        UserError: config.json has unsupported fields, tensors do not match the model, a value is not finite,
            the disk is full, or other work on `out` is unfinished.
    """
    hf_dir, out = Path(hf_dir), Path(out)
    check_dtype_name(dtype)
    check_output_folder(out, CHECKPOINT_KIND, overwrite)
    check_model_path(hf_dir)
    check_folder_kind(hf_dir, (HF_MODEL,), "a Hugging Face folder")
    if not (hf_dir / CONFIG).is_file():
        raise UserError(f"{hf_dir}: has no {CONFIG}, so it is not a Hugging Face folder; "
                        "pass the folder that holds the model")
    for name in TOKENIZER_FILES:
        # Check now; later errors would blame the copy in the checkpoint.
        if name.endswith(".json"):
            refuse_outside_link(hf_dir, hf_dir / name)
            read_optional_json(hf_dir / name)
    source = HfWeights(hf_dir)
    check_dtypes(source)
    for note in source.notes:
        warn(f"{hf_dir}: {note}")
    check_copies(source)
    content = {SOURCE: find_hub_name(hf_dir)} | ({CARRIED_FIELDS: source.carried} if source.carried else {})
    write_imported(out, ImportSource(source, "from-hf", hf_dir, read_token_ids(hf_dir), content), dtype,
                   workers=workers, overwrite=overwrite, redo=redo)
    return source.notes


@dataclass(frozen=True)
class StateBlock:
    """A block of optimizer state to import."""

    key: str
    """Key in the part `optimizer`."""
    link: Link
    """Link of the weight."""
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def name(self) -> str:
        return format_block_name(self.key, self.link.offset)


def list_states(weights: Weights, get_names: Callable[[Link], Mapping[str, str]]) -> list[StateBlock]:
    """Return the blocks of optimizer tensors for all trained weights.

    `get_names`: returns our name -> name for `Weights.locate` of the tensors of a link. Raises `UserError`: a
    weight has no such tensor.
    """
    blocks, stored_keys = [], {*weights.tensors.keys()}
    trained_links = [link for link in weights.links if not link.fp32]
    for link in trained_links:
        for ours, theirs in get_names(link).items():
            keys = [key for key, _, _ in weights.locate(link, theirs)]
            if missing := [key for key in keys if key not in stored_keys]:
                raise UserError(f"{weights.path}: its optimizer has no {missing[0]}; pass --weights-only")
            blocks.append(StateBlock(f"{ours}/{link.key}", link, weights.tensors.get_dtype(keys[0]),
                                     partial(weights.read_block, link, theirs)))
    return blocks


@dataclass(frozen=True)
class TrainingState:
    """Position and settings of the training that wrote a checkpoint."""

    step: int
    """Step at which our schedule has the next learning rate."""
    num_updates: int
    settings: tuple[str, ...]
    """Settings for --set with which a run continues the schedule."""


@dataclass(frozen=True)
class ImportSource:
    """Source for a checkpoint: weights under Hugging Face names and companion files."""

    weights: Weights
    """Tensor source; folder and dtype determine every byte in the checkpoint."""
    command: str
    """Command name for messages and the progress bar."""
    tokenizer: Path | None
    """Tokenizer folder."""
    tokens: TokenIds
    """Special token ids, for tokenizer files without ids."""
    content: Mapping[str, Any]
    """Additional manifest entries."""
    states: Sequence[StateBlock] = ()
    """Optimizer state."""
    training: TrainingState | None = None
    """None: step 0."""


def write_imported(out: Path, source: ImportSource, dtype: str, *, workers: int, overwrite: bool,
                   redo: bool) -> None:
    """Write a checkpoint (part `model`, and `optimizer` if `source` has states), which appears when complete.
    For the other arguments see `from_hf`. Raises `UserError`: a tensor is damaged, a value is not finite, the
    disk is full, or other work on `out` is unfinished."""
    weights, folder = source.weights, source.weights.path
    links = {format_block_name(link.key, link.offset): link for link in weights.links}
    files = plan_files(links, weights.get_dtype, dtype)
    states = {block.name: block for block in source.states}
    state_links = {name: dataclasses.replace(block.link, key=block.key) for name, block in states.items()}
    shards = plan_shards([TensorSpec(name, block.link.block_shape, block.dtype)
                          for name, block in states.items()], MAX_FILE_BYTES)
    state_files = {format_file_name(OPTIMIZER, 0, i): shard for i, shard in enumerate(shards) if shard}
    plan = {"from": fingerprint_folder(folder), "dtype": dtype, "model": dataclasses.asdict(weights.model),
            "files": hash_file_plan(files | state_files)}

    def read_block(spec: TensorSpec) -> torch.Tensor:
        if spec.name in states:
            return convert_tensor(states[spec.name].read(), spec.dtype, folder, spec.name)
        link = links[spec.name]
        block: torch.Tensor = link.join({name: convert_tensor(weights.read(name), spec.dtype, folder, name)
                                         for name in link.hf_names})
        return block

    with resumable_artifact(out, CHECKPOINT_KIND, f"megatron-sov convert {source.command}", plan,
                            overwrite=overwrite, redo=redo) as artifact:
        write_unfinished(artifact, files | state_files, read_block, [weights],
                         lambda spec: (links | state_links)[spec.name].hf_names, source.command, workers)
        if (folder / MANIFEST).is_file():
            artifact.writer.add_input(folder)
        write_index(artifact.path, PART, [build_index(files, links)])
        parts, step = [PART], 0
        if source.training is not None:
            parts, step = [PART, OPTIMIZER], source.training.step
            write_index(artifact.path, OPTIMIZER, [build_index(state_files, state_links)])
            write_atomically(artifact.path / STATE_FILE, format_json({
                "step": step, "tokens": 0, "wall_s": 0.0, "num_updates": source.training.num_updates,
                "data": {}}))
        if source.tokenizer is not None:
            copy_companions(source.tokenizer, artifact.path / "tokenizer", source.tokens)
        artifact.writer.content = {"step": step, "parts": parts, "tokens": 0, **source.content}
        code = models.FAMILY_PLUGINS.code(weights.model.family)
        codes = (code,) if code else ()
        artifact.writer.settings = RunConfig(IMPORTED_RECIPE, weights.model, code=codes).to_dict()


def plan_files(links: dict[str, Link], dtype_of: Callable[[str], torch.dtype],
               dtype: str) -> dict[str, list[TensorSpec]]:
    """Return file name -> checkpoint blocks. `links`: block name -> link; `dtype_of`: returns the dtype of a
    Hugging Face tensor in the source; `dtype`: see `from_hf`."""
    specs = [
        TensorSpec(name, link.block_shape, choose_dtype(dtype, link.fp32, dtype_of(link.hf_names[0])))
        for name, link in links.items()]
    return {format_file_name(PART, 0, i): shard for i, shard in enumerate(plan_shards(specs, MAX_FILE_BYTES))}


def build_index(files: dict[str, list[TensorSpec]], links: dict[str, Link]) -> Index:
    index: Index = {}
    for file, blocks in files.items():
        for spec in blocks:
            link = links[spec.name]
            add_index_entry(index, link.key, spec.dtype, link.shape,
                            StoredBlock(file, spec.name, link.offset, link.extent))
    return index
