"""Named data sources of a run: the token artifacts in data.paths, with their splits."""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import manifest_sha256, read_manifest
from megatron_sov.base.documents.shard_files import (
    FEATURES, ROUTES, WRITTEN, RouteShape, check_token_manifest)
from megatron_sov.base.errors import Fix, UserError, warn
from megatron_sov.chat.vocabulary import find_difference
from megatron_sov.model.config.data import split_source_name
from megatron_sov.model.modality import Banks, read_banks
from megatron_sov.runs.launch_environment import is_first_rank
from megatron_sov.train.data.token_shards import Documents, ShardChain

TEXTS = ("text", "chat")
"""Data formats with a loss on single tokens."""
COMMANDS_BY_FORMAT = {"text": "`megatron-sov pretrain` learns from text",
                      "chat": "`megatron-sov sft` learns from chats",
                      "preference": "`megatron-sov prefer` learns from pairs of responses",
                      "prompt": "`megatron-sov rl run` takes a file of prompts, unpacked, as --prompts"}
"""Data format -> sentence about the command that trains on it."""
NO_COLUMNS = ("loss", "type", WRITTEN, ROUTES, FEATURES)
"""Sidecars that are not columns with a number per label."""


@dataclass(frozen=True)
class Source:
    """A named source in a token artifact, with training and held-out documents."""

    name: str
    """Name in blends, events and the report."""
    artifact: Path | None
    """Token artifact folder; None if `train_documents` are built in memory."""
    format: str
    """Data format: "text", "chat", "prompt", "rollouts" (`data.rounds`), or "preference", with chosen and
    rejected response to a prompt in documents 2i and 2i + 1."""
    prefixes: dict[str, tuple[str, ...]]
    """Split ("train", "heldout") -> shard prefixes inside the artifact."""
    num_tokens: dict[str, int]
    """Split -> tokens."""
    share: float
    """Share in an empty blend; the sum over sources is 1."""
    train_documents: Documents | None = None
    """Training documents that replace the artifact's training split."""
    vocab_size: int = sys.maxsize
    """Tokenizer vocabulary size."""
    columns: tuple[str, ...] = ()
    """Columns in the shards, in addition to loss weights and types."""
    group: int = 1
    """Consecutive documents per unit: 2 for preference pairs, else 1."""
    tokenizer: Path | None = None
    """Tokenizer folder; by default the artifact's folder `tokenizer`."""
    routes: RouteShape | None = None
    """Shape for recorded expert routes; None for documents without routes."""
    banks: Banks = field(default_factory=dict)
    """Kind -> bank with pictures or sounds whose features replace placeholder tokens."""

    @property
    def is_chat(self) -> bool:
        """Whether documents have loss weights and are never split over rows."""
        return self.format != "text"

    def open_split(self, split: str) -> Documents:
        """Open the documents in the split "train" or "heldout"."""
        if self.train_documents is not None and split == "train":
            return self.train_documents
        if self.artifact is None:
            raise ValueError(f"source {self.name} has neither an artifact nor documents")
        return ShardChain([self.artifact / prefix for prefix in self.prefixes[split]], self.vocab_size,
                          self.columns, self.routes, self.banks)


def open_sources(paths: dict[str, float], vocab_size: int,
                 formats: tuple[str, ...] | None = TEXTS, *, warns: bool = True, is_fixed: bool = False
                 ) -> list[Source]:
    """Open the sources in token artifacts, and check that they fit each other and the model.

    `paths` maps [NAME=]folder to a weight: NAME renames a single source, and several become NAME-SOURCE.
    `vocab_size` belongs to the model; `is_fixed` means that it cannot be set. `formats` are supported values
    of `Source.format` (None: any). `warns=False` omits `warn_about_heldout_rules`.

    Raises `UserError` if `paths` is empty, tokenizers differ, two sources have one name, or a tokenizer has
    more ids than the model."""
    if not paths:
        raise UserError("data.paths is empty: pass at least one folder made by `sov-data pack` "
                        "with --data DIR")
    manifests = {path: read_manifest(split_source_name(path)[1], "tokens") for path in paths}
    for path, manifest in manifests.items():
        check_token_manifest(path, manifest.content)
    hashes = {path: m.content["tokenizer_sha256"] for path, m in manifests.items()}
    first = next(iter(paths))
    for path, value in hashes.items():
        folders = [Path(split_source_name(shards)[1]) / "tokenizer" for shards in (path, first)]
        if value != hashes[first] and (problem := find_difference(*folders)):
            raise UserError(f"{path}: was packed with tokenizer {value[:12]}, {first} with "
                            f"{hashes[first][:12]} ({problem}); pack all data with the same tokenizer")
    if warns:
        warn_about_heldout_rules({path: m.content for path, m in manifests.items()})
    total_weight = sum(paths.values())
    if total_weight <= 0:
        raise UserError(f"--data weights {list(paths.values())}: at least one must be positive")
    sources: list[Source] = []
    for path, manifest in manifests.items():
        if manifest.content["vocab_size"] > vocab_size:
            fix = "pack with the model's own tokenizer" if is_fixed else (
                "set model.vocab_size or pack with another tokenizer")
            raise UserError(f"{path}: its tokenizer has {manifest.content['vocab_size']} ids, the model only "
                            f"model.vocab_size = {vocab_size}; {fix}")
        sources += _build_sources(path, manifest.content, paths[path] / total_weight, formats)
    artifacts: dict[str, Path | None] = {}
    for source in sources:
        if source.name in artifacts:
            raise UserError(f"source {source.name!r}: is in --data {artifacts[source.name]} and in "
                            f"{source.artifact}; name one of the folders, as --data NAME={source.artifact}")
        artifacts[source.name] = source.artifact
    return sources


def warn_about_heldout_rules(contents: dict[str, dict[str, Any]]) -> None:
    """Warn if artifacts with one data format have different rules for held-out documents.

    A document may then be in the training split of an artifact and in the held-out split of another."""
    for kind in sorted({s["format"] for content in contents.values() for s in content["sources"]}):
        rules = {path: content.get("heldout") for path, content in contents.items()
                 if any(s["format"] == kind for s in content["sources"])}
        if any(rule != next(iter(rules.values())) for rule in rules.values()) and is_first_rank():
            warn(f"--data {', '.join(rules)}: documents were held out by different rules, so one folder may "
                 "train on another's held-out documents; join them by `sov-data mix`, which checks this")


def name_sources(path: str, content: dict[str, Any]) -> dict[str, str]:
    """Return source name in the manifest `content` -> name in the run, for `path` = [NAME=]folder."""
    name, names = split_source_name(path)[0], [source["name"] for source in content.get("sources", [])]
    if not name:
        return {source: source for source in names}
    if len(names) == 1:
        return {names[0]: name}
    return {source: f"{name}-{source}" for source in names}


def _fix_stage(kind: str) -> Fix | None:
    """Return the command that learns from data of a format."""
    match = re.search(r"`megatron-sov (sft|prefer)`", COMMANDS_BY_FORMAT.get(kind, ""))
    return Fix(command=match[1]) if match else None


def _build_sources(named_path: str, content: dict[str, Any], share: float,
                   formats: tuple[str, ...] | None) -> list[Source]:
    records, path = content["sources"], Path(split_source_name(named_path)[1])
    names = name_sources(named_path, content)
    for record in records:
        if formats is not None and record["format"] not in formats:
            raise UserError(f"{path}: source {record['name']!r} holds data of format {record['format']!r}, "
                            f"this stage learns from {' or '.join(formats)}; "
                            f"{COMMANDS_BY_FORMAT.get(record['format'], 'pass other data')}",
                            _fix_stage(record["format"]))
    train_tokens = sum(record["splits"]["train"]["num_tokens"] for record in records)
    if train_tokens == 0:
        raise UserError(f"{path}: holds no training tokens; pack more text")
    sources = []
    for record in records:
        where, sidecars, prefixes = f"{path}: source {record['name']!r}", record.get("sidecars", ()), {}
        for split, counts in record["splits"].items():
            prefixes[split] = tuple(shard["prefix"] for shard in counts["shards"])
        sources.append(Source(
            name=names[record["name"]], artifact=path, format=record["format"], prefixes=prefixes,
            num_tokens={split: counts["num_tokens"] for split, counts in record["splits"].items()},
            share=share * record.get("weight", record["splits"]["train"]["num_tokens"] / train_tokens),
            vocab_size=content["vocab_size"],
            columns=tuple(name for name in sidecars if name not in NO_COLUMNS),
            group=record.get("group_documents", 1),
            routes=RouteShape.from_record(record.get(ROUTES), where) if ROUTES in sidecars else None,
            banks=read_banks(record.get(FEATURES), where)))
    return sources


def tokenizer_folder(sources: list[Source]) -> Path | None:
    """Return the data's tokenizer folder, or None."""
    folders = (source.tokenizer or (source.artifact and source.artifact / "tokenizer") for source in sources)
    return next((f for f in folders if f is not None and (f / "tokenizer.json").is_file()), None)


def describe_inputs(sources: list[Source]) -> list[dict[str, str]]:
    """Return kind, path and manifest hash for each artifact in `sources`."""
    folders = dict.fromkeys(s.artifact for s in sources if s.artifact is not None)
    return [describe_input("tokens", folder) for folder in folders]


def describe_input(kind: str, folder: Path) -> dict[str, str]:
    """Return kind, path and manifest hash for an artifact."""
    return {"kind": kind, "path": str(folder), "manifest_sha256": manifest_sha256(folder)}
