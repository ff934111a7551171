"""A Hugging Face folder becomes a checkpoint that any layout can load; memory holds two blocks of each
file in the making.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_sov.base.artifacts import (
    MANIFEST, FileRecord, atomic_write, file_damage, read_manifest, refuse_existing, to_json)
from megatron_sov.base.digests import fingerprint
from megatron_sov.base.errors import UserError, warn
from megatron_sov.base.outputs import refuse_link_outside
from megatron_sov.chat.folder import CONFIG_JSON, TEMPLATE, TOKENIZER_JSON, read_chat_encoder, special_text
from megatron_sov.chat.vocabulary import read_tokenizer
from megatron_sov.checkpoint.assembling import StoredBlock
from megatron_sov.checkpoint.sharded_tensors import (
    MAX_FILE_BYTES, Index, add_block, block_name, file_name, write_index)
from megatron_sov.checkpoint.writer import Reader, TensorSpec, write_file
from megatron_sov.convert import DEFAULT_WORKERS
from megatron_sov.convert.dtypes import KEEP, check_dtype_name, check_space, convert_tensor, planned_dtype
from megatron_sov.convert.peft import AdaptedWeights
from megatron_sov.convert.sources import PART, HfWeights, Weights, check_dtypes, has_same_bits
from megatron_sov.model.config import RunConfig
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import TokenIds
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import CONFIG, DAMAGED_HF, hub_name, listed, read_json
from megatron_sov.runs.checkpoints import (
    ADAPTER, HF_MODEL, IMPORTED, KIND, SOURCE, instead_of, refuse_missing, refuse_other_kind)
from megatron_sov.work.progress.resumable import resumable_artifact

# Tensors that stand twice in a Hugging Face folder: a prediction layer behind the trunk has embedding
# and head once more, under names of its own. A checkpoint holds each once.

def copies_of(weights: Weights) -> dict[str, str]:
    """Return name -> the tensor that it equals, of all that are written a second time."""
    return models.get(weights.model.family).copies_in(weights.model)


def differing_copies(folder: HfWeights) -> list[str]:
    """Return those that a folder has and that differ, in one bit or in the dtype, from what they are a copy
    of; two tensors are in memory at a time."""
    return [name for name, other in folder.copies.items() if not has_same_bits(folder.read(name),
                                                                              folder.read(other))]


def check_copies(folder: HfWeights) -> None:
    """Raise `UserError` where a copy differs: a model that has one embedding and one head cannot hold it."""
    if differing := differing_copies(folder):
        name = differing[0]
        raise UserError(f"{folder.path}: {name} differs from {folder.copies[name]}, and a prediction layer "
                        "has no embedding or head of its own here; save the model with one of each")


# Writes safetensors files, several at a time, so that memory holds two tensors of each and not the
# files.

def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Divide tensors, in order, into files of at most `max_shard_bytes` (a larger tensor gets
    a file of its own)."""
    shards: list[list[TensorSpec]] = [[]]
    filled_bytes = 0
    for spec in specs:
        if shards[-1] and filled_bytes + spec.size_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(spec)
        filled_bytes += spec.size_bytes
    return shards


def digest_of(files: Mapping[str, list[TensorSpec]]) -> str:
    """Return a hash of which file holds which tensors: what an unfinished conversion is known again by."""
    names = json.dumps([[file, [spec.name for spec in specs]] for file, specs in files.items()])
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def write_files(folder: Path, files: dict[str, list[TensorSpec]], read: Reader, workers: int,
                finish: Callable[[str, FileRecord], None]) -> None:
    """Write the planned files, `workers` at a time; which of them is written when changes no byte.

    Args:
        folder: where to write.
        files: name -> tensors, e.g. of `plan_shards`.
        read: gives each tensor.
        workers: files at a time, each with a thread that reads, and one that hashes and writes; all leave the
            interpreter free.
        finish: called for each file when it is on disk, with hash and size.

    Raises:
        UserError: the first that `read` raised; files that have not begun are not written then.
    """
    def write(name: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(1) as reader:
            record = write_file(path, files[name], read, reader)
        finish(name, record)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a file's thread is busy by itself
    pool = ThreadPoolExecutor(workers)
    try:
        for done in as_completed([pool.submit(write, name) for name in files]):
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


# Hashes the files of a source while it is converted, so that neither waits for the other.
#
# Nothing that was made from a damaged file outlives the check: a written file counts as finished only when
# those that it was made from are whole, and an artifact appears only when all are.

class SourceCheck:
    """A check under way; obtained from `checked_source`."""

    def __init__(self, weights: Weights, found: dict[str, Future[str | None]], remedy: str,
                 base: SourceCheck | None) -> None:
        self._weights, self._found, self._remedy, self._base = weights, found, remedy, base

    def require(self, names: Iterable[str]) -> None:
        """Wait until the tensors' files have been looked at.

        Args:
            names: Hugging Face names of tensors.

        Raises:
            UserError: a file is missing or was changed since it was written; the message names it,
                and what it holds.
        """
        names = list(names)
        if self._base is not None:
            self._base.require(names)
        files = {file for name in names for file in self._weights.files_of(name)}
        self._refuse_damage(file for file in self._found if file in files)

    def require_all(self) -> None:
        """Wait until every file has been looked at; `UserError` as `require`."""
        self._refuse_damage(self._found)

    def _refuse_damage(self, files: Iterable[str]) -> None:
        for file in files:
            if problem := self._found[file].result():
                held = self._weights.held_in(file)
                raise UserError(f"{problem}{f' (it holds {listed(held)})' if held else ''}; {self._remedy}")


@contextlib.contextmanager
def checked_source(weights: Weights, workers: int) -> Iterator[SourceCheck]:
    """Check the files that a conversion reads (all but other parts, as the optimizer's) against the
    manifest, where there is one, beside what is done inside.

    Args:
        weights: the source.
        workers: files that are hashed at a time.

    Raises:
        UserError: a file is missing or was changed since it was written; in place of any other error that
            came up inside, which may be its consequence.
    """
    if isinstance(weights, AdaptedWeights):
        with checked_source(weights.base, workers) as base, _check_folder(weights, workers, base) as check:
            yield check
    else:
        with _check_folder(weights, workers, None) as check:
            yield check


@contextlib.contextmanager
def _check_folder(weights: Weights, workers: int, base: SourceCheck | None) -> Iterator[SourceCheck]:
    """Check one folder's files; `base` is the check of what an adapter belongs to."""
    path, pool = weights.path, ThreadPoolExecutor(workers)
    found: dict[str, Future[str | None]] = {}
    remedy = DAMAGED_HF
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        others = tuple(f"{part}/" for part in manifest.content.get("parts", [])
                       if part not in (PART, ADAPTER))
        found = {name: pool.submit(file_damage, path / name, record)
                 for name, record in manifest.files.items() if not name.startswith(others)}
        remedy = instead_of(path) if manifest.kind == KIND else DAMAGED_HF
    check = SourceCheck(weights, found, remedy, base)
    try:
        yield check
        check.require_all()
    # a damaged file may be the reason for whatever went wrong inside: its message says what to do, the other
    # one does not
    except Exception:
        check.require_all()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


# What travels with the weights: tokenizer files, chat template, generation defaults and the token ids in
# them.
#
# In a checkpoint these files stand in `tokenizer/`, in a Hugging Face folder beside the weights.

CARRIED_FIELDS = "config_fields"
"""Key of a checkpoint's manifest: fields of config.json that say nothing of our model."""


def copy_carried_fields(checkpoint: Path) -> dict[str, Any]:
    """Return the content for the manifest of a checkpoint that is trained or averaged from `checkpoint`: the
    fields of config.json that `checkpoint` was imported with, under `CARRIED_FIELDS`; {} if it has none."""
    fields = read_manifest(checkpoint).content.get(CARRIED_FIELDS)
    return {CARRIED_FIELDS: fields} if fields else {}


GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
                   GENERATION_CONFIG)
"""Files that are carried along; anything else (code above all) stays behind."""


def carry(source: Path, target: Path, tokens: TokenIds) -> None:
    """Copy the companion files of `source` to `target`, and add to the generation defaults the `tokens` that
    they lack: transformers' generate reads no other file where there is generation_config.json."""
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            refuse_link_outside(source, source / name)
            shutil.copyfile(source / name, target / name)
    defaults = _read_if_there(target / GENERATION_CONFIG)
    known = ids_in(defaults)
    missing = {f"{name}_token_id": value for name, value in vars(tokens).items()
               if not set(ids_as_list(value)) <= set(ids_as_list(getattr(known, name)))}
    if missing:
        atomic_write(target / GENERATION_CONFIG, to_json(defaults | missing))


def move_chat_template(folder: Path) -> None:
    """Give the chat template of tokenizer_config.json a file of its own, as transformers 5 writes it; a file
    that is there already stays."""
    file, own = folder / CONFIG_JSON, folder / TEMPLATE
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    template = config.pop("chat_template", None)
    # a list holds several templates by name, which transformers reads where they are
    if not isinstance(template, str):
        return
    if not own.exists():
        atomic_write(own, template.encode())
    atomic_write(file, to_json(config))


def with_turn_ends(folder: Path, tokens: TokenIds) -> TokenIds:
    """Return token ids whose eos is all at which generation ends: eos itself, and what ends an assistant's
    turn in the chat template of `folder`; engines stop there."""
    try:
        chat = read_chat_encoder(folder)
    except UserError as e:
        warn(f"{e}; generation stops at eos alone")
        chat = None
    found = ids_as_list(tokens.eos)
    if chat is not None:
        found += [id_ for id_ in chat.end_ids() if id_ not in found]
    return replace(tokens, eos=found if len(found) > 1 else next(iter(found), None))


def generation_ids(folder: Path) -> TokenIds:
    """Return the token ids that an export writes into generation_config.json: those that the files of
    `folder` name (`ids_beside`), and the ends of turns.

    Raises:
        UserError: as `ids_beside`.
    """
    return with_turn_ends(folder, ids_beside(folder))


def ids_in(config: dict[str, Any]) -> TokenIds:
    """Return the token ids of a config.json or generation_config.json; other values are left out."""
    found: dict[str, Any] = {}
    for name in ("bos", "eos", "pad"):
        value = config.get(f"{name}_token_id")
        values = value if isinstance(value, list) else [value]
        ids = [id_ for id_ in values if type(id_) is int and id_ >= 0]
        found[name] = ids if ids and isinstance(value, list) else next(iter(ids), None)
    return TokenIds(**found)


def ids_as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def ids_beside(folder: Path) -> TokenIds:
    """Return the token ids that the files of `folder` name, each by the first file that has it:
    generation_config.json, config.json, its part of the text model, the tokenizer's special tokens.

    Raises:
        UserError: a file is damaged, or names an end of text that the tokenizer does not have.
    """
    config = _read_if_there(folder / CONFIG)
    inside = config.get("text_config")
    found: dict[str, Any] = {}
    defaults = _read_if_there(folder / GENERATION_CONFIG)
    for named in (defaults, config, inside if isinstance(inside, dict) else {}):
        found |= {name: value for name, value in vars(ids_in(named)).items() if found.get(name) is None}
    missing = [name for name, value in found.items() if value is None]
    return TokenIds(**found | _ids_of_texts(folder, missing))


def _ids_of_texts(folder: Path, names: list[str]) -> dict[str, int]:
    """Return the ids of "bos", "eos" and "pad" tokens that tokenizer_config.json names by their texts."""
    texts = {name: text for name in names if (text := special_text(folder, f"{name}_token"))}
    if not texts or not (folder / TOKENIZER_JSON).is_file():
        return {}
    tokenizer = read_tokenizer(folder)
    ids = {text: id_ for id_, text in tokenizer.ordinary.items()}
    ids |= {token["content"]: id_ for id_, token in tokenizer.added.items()}
    if (end := texts.get("eos", "")) and end not in ids:  # text would never end; the others may be unused
        raise UserError(f"{folder / CONFIG_JSON}: eos_token = {end!r} is not a token of {TOKENIZER_JSON}; "
                        "correct it there")
    return {name: ids[text] for name, text in texts.items() if text in ids}


def split_conflict(folder: Path, split: str | None) -> str | None:
    """Return what to tell a user whose tokenizer.json splits text otherwise than its reader, who uses
    `split`; else None."""
    tokenizer_file = folder / "tokenizer.json"
    if split is None or not tokenizer_file.is_file():
        return None
    if json.dumps(split) in json.dumps(read_json(tokenizer_file).get("pre_tokenizer")):
        return None
    return (f"{tokenizer_file} splits text by another regular expression than transformers' AutoTokenizer, "
            "which does not read it for this model family and may give other token ids; "
            "load it with PreTrainedTokenizerFast.from_pretrained")


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def from_hf(hf_dir: str | Path, out: str | Path, dtype: str = KEEP, *, workers: int = DEFAULT_WORKERS,
            overwrite: bool = False, redo: bool = False) -> None:
    """Write a Hugging Face folder as a checkpoint (part "model", step 0).

    Args:
        hf_dir: a folder with config.json and safetensors files.
        out: the checkpoint to write; it appears only when complete, and a killed command
            goes on where it was.
        dtype: "float32", "bfloat16", "float16", "float64", or "keep" for the folder's own;
            router biases are float32 always.
        workers: files that are written at a time.
        overwrite: replace a checkpoint that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: the config has fields that we do not honour, the tensors are not exactly those of its
            model, a value is not finite, the disk is full,
            or other work on the output is unfinished.
    """
    hf_dir, out = Path(hf_dir), Path(out)
    check_dtype_name(dtype)
    refuse_existing(out, KIND, overwrite)
    refuse_missing(hf_dir)
    refuse_other_kind(hf_dir, (HF_MODEL,), "a Hugging Face folder")
    if not (hf_dir / CONFIG).is_file():
        raise UserError(f"{hf_dir}: has no {CONFIG}, so it is not a Hugging Face folder; "
                        "pass the folder that holds the model")
    for name in TOKENIZER_FILES:
        # now: later programs would blame the checkpoint's copy of a damaged file
        if name.endswith(".json"):
            refuse_link_outside(hf_dir, hf_dir / name)
            _read_if_there(hf_dir / name)
    source = HfWeights(hf_dir)
    check_dtypes(source)
    for note in source.notes:
        warn(f"{hf_dir}: {note}")
    check_copies(source)
    content = {SOURCE: hub_name(hf_dir)} | ({CARRIED_FIELDS: source.carried} if source.carried else {})
    write_imported(out, Imported(source, "from-hf", hf_dir, ids_beside(hf_dir), content), dtype,
                   workers=workers, overwrite=overwrite, redo=redo)


@dataclass(frozen=True)
class Imported:
    """What a checkpoint is made of, under Hugging Face names."""

    weights: Weights
    """Where the tensors come from; their folder decides, with the dtype, every byte."""
    what: str
    """Name of the work, for its bar."""
    tokenizer: Path | None
    """Folder of the tokenizer's files."""
    tokens: TokenIds
    """Ids of special tokens, where no file of the tokenizer says them."""
    content: Mapping[str, Any]
    """Of the manifest, besides what every checkpoint has."""


def write_imported(out: Path, source: Imported, dtype: str, *, workers: int, overwrite: bool,
                   redo: bool) -> None:
    """Write a checkpoint (part "model", step 0); it appears only when complete.

    Args:
        out: the checkpoint.
        source: what it is made of.
        dtype: as of `from_hf`.
        workers: files that are written at a time.
        overwrite: replace a checkpoint that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: a tensor is damaged, a value is not finite, the disk is full,
            or other work on the output is unfinished.
    """
    weights, folder = source.weights, source.weights.path
    links = {block_name(link.key, link.offset): link for link in weights.links}
    files = planned_files(links, weights.dtype, dtype)
    plan = {"from": fingerprint(folder), "dtype": dtype, "model": dataclasses.asdict(weights.model),
            "files": digest_of(files)}
    with resumable_artifact(out, KIND, f"megatron-sov convert {source.what}", plan, overwrite=overwrite,
                            redo=redo) as artifact, \
            tqdm(total=len(links), desc=source.what, unit="block", disable=None) as bar:
        missing = {name: blocks for name, blocks in files.items() if name not in artifact.finished}
        check_space(out, sum(spec.size_bytes for blocks in missing.values() for spec in blocks))
        bar.update(len(links) - sum(map(len, missing.values())))

        def read(spec: TensorSpec) -> torch.Tensor:
            link = links[spec.name]
            parts = {name: convert_tensor(weights.read(name), spec.dtype, folder, name) for name
                     in link.hf_names}
            block: torch.Tensor = link.join(parts)
            bar.update()
            return block

        with checked_source(weights, workers) as check:
            def finish(name: str, record: FileRecord) -> None:
                check.require(hf_name for spec in files[name] for hf_name in links[spec.name].hf_names)
                artifact.finish(name, record)

            write_files(artifact.path, missing, read, workers, finish)
        if (folder / MANIFEST).is_file():
            artifact.writer.add_input(folder)
        write_index(artifact.path, PART, [index_of(files, links)])
        if source.tokenizer is not None:
            carry(source.tokenizer, artifact.path / "tokenizer", source.tokens)
        artifact.writer.content = {"step": 0, "parts": [PART], "tokens": 0, **source.content}
        code = models.OWN.code(weights.model.family)
        artifact.writer.settings = RunConfig(IMPORTED, weights.model, code=(code,) if code else ()).to_dict()


def planned_files(links: dict[str, Link], dtype_of: Callable[[str], torch.dtype],
                  dtype: str) -> dict[str, list[TensorSpec]]:
    """Return every block of a checkpoint, once, by the name of its file.

    Args:
        links: block -> its link.
        dtype_of: Hugging Face name -> the dtype in which a tensor comes.
        dtype: as of `from_hf`.
    """
    specs = [
        TensorSpec(name, link.block_shape, planned_dtype(dtype, link.fp32, dtype_of(link.hf_names[0])))
        for name, link in links.items()]
    return {file_name(PART, 0, i): shard for i, shard in enumerate(plan_shards(specs, MAX_FILE_BYTES))}


def index_of(files: dict[str, list[TensorSpec]], links: dict[str, Link]) -> Index:
    """Return the index of the blocks of `planned_files`."""
    index: Index = {}
    for file, blocks in files.items():
        for spec in blocks:
            link = links[spec.name]
            add_block(index, link.key, spec.dtype, link.shape,
                      StoredBlock(file, spec.name, link.offset, link.extent))
    return index
