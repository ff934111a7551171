"""`sov-data mix`: join token shard artifacts into one, with weights or a blend.

Shards are hard links to the inputs if the file system permits, else copies. Artifacts never change in place,
so links stay valid.
"""

import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt

from data_prep.mixture.blend_file import (
    Missing, PhaseShares, allot_shares, check_epochs, combine_phases, find_blend, format_shares, read_blend)
from data_prep.shards.token_artifact import KIND, TRAIN, check_overlap, read_tokens_manifest
from megatron_sov.base.artifacts import (
    ArtifactWriter, Manifest, check_output_folder, create_artifact, sha256_file)
from megatron_sov.base.digests import hash_file, parse_digest_algorithm
from megatron_sov.base.documents.shard_files import CONTENT_VERSION
from megatron_sov.base.errors import Fix, UserError, choose_free_path
from megatron_sov.base.outputs import link_or_copy
from megatron_sov.base.settings import (
    DeclaredCommand, Flag, NotNegative, ProblemCode, SettingsError, SettingsProblem, find_all_problems)
from megatron_sov.chat.folder import CONFIG_JSON, TOKENIZER_JSON
from megatron_sov.chat.vocabulary import find_difference

SHARED_FIELDS = ("tokenizer_sha256", "vocab_size", "eos_id", "eod", "bos_id", "dtype")
"""Manifest fields that all parts must share."""


@dataclass(frozen=True)
class MixPart:
    """An input artifact with its weight."""

    path: Path
    """Artifact of kind "tokens"."""
    weight: float | None
    """Share of a run, relative to the other parts; None: by token count."""


@dataclass(frozen=True, kw_only=True)
class BlendLimits:
    """Settings that turn a blend into shares per source."""

    num_tokens: Annotated[NotNegative, Flag("--tokens", "N")] = 0
    """--blend: tokens in all phases together (default: the blend's budgets)."""
    max_epochs: Annotated[float, Gt(0), Flag(value="N")] = 4.0
    """--blend: refuse to read a source more often; more than four passes gain little (arXiv 2305.16264)."""
    missing: Missing = "refuse"
    """--blend: if no source matches a share, refuse the blend, or spread the share over its phase."""


@dataclass(frozen=True, kw_only=True)
class BlendSettings(BlendLimits):
    """A blend file with its limits."""

    file: Path


@dataclass(frozen=True, kw_only=True)
class MixOptions(BlendLimits):
    """Join token shards of several folders into one. A weight is the folder's share of a run relative to the
    others; without weights the tokens decide. Within a folder its own weights, or tokens, decide. --blend
    shares each phase of a curriculum out by the tags of the sources."""

    data: Annotated[tuple[str, ...], Flag("DIR[:WEIGHT]")]
    """Folder from `sov-data pack` or `sov-data mix`."""
    output: Annotated[Path | None, Flag(value="DIR")] = None
    """Folder for the mix."""
    blend: Annotated[str | None, Flag(value="FILE|NAME")] = None
    """Shares per phase by kind, level, synthetic or name; a YAML file, or a shipped blend (solar-open,
    k-exaone)."""
    dry_run: bool = False
    """--blend: print shares and epochs, and write nothing."""
    overwrite: bool = False
    """Replace an existing mix."""

    @property
    def limits(self) -> BlendLimits:
        return BlendLimits(num_tokens=self.num_tokens, max_epochs=self.max_epochs, missing=self.missing)

    def problems(self) -> list[SettingsProblem]:
        p = []
        if self.output is None and not self.dry_run:
            p.append(SettingsProblem(ProblemCode.RULE, "output", "is missing; name a folder to write",
                                     fix=Fix(options=("--output", choose_free_path("new-output")))))
        for name, value in vars(self.limits).items():
            if value != getattr(BlendLimits, name) and not self.blend:
                p.append(SettingsProblem(ProblemCode.RULE, name,
                                         "is for --blend; leave it out, or name a blend", value))
        if self.dry_run and not self.blend:
            p.append(SettingsProblem(ProblemCode.RULE, "dry_run", "is for --blend; leave it out"))
        return p


def run_mix(options: MixOptions) -> None:
    parts = [parse_part(argument) for argument in options.data]
    weighted = [part for part in parts if part.weight is not None]
    if weighted and options.blend:
        raise UserError(f"{weighted[0].path}:{weighted[0].weight:g}: folders have no weights beside "
                        "--blend, which says every share; leave the weight out")
    blend = None
    if options.blend:
        blend = BlendSettings(file=find_blend(options.blend), **vars(options.limits))
        if options.dry_run:
            phases, sources = _allot_blend([read_tokens_manifest(part.path) for part in parts], blend)
            print("\n".join(format_shares(phases, sources)))
            return
    assert options.output is not None
    write_mix(parts, options.output, blend, overwrite=options.overwrite)


MIX = DeclaredCommand(MixOptions, run_mix)


def parse_part(argument: str) -> MixPart:
    """Parse `DIR[:WEIGHT]`. Raises `UserError`: the weight is not a positive number."""
    head, colon, tail = argument.rpartition(":")
    match = re.fullmatch(r"(.+)=([\d.]+%?)", argument)
    if match and not Path(argument).exists():
        raise UserError(f"{argument!r}: a weight follows its folder after a colon",
                        Fix(words={argument: f"{match[1]}:{match[2]}"}))
    if not colon or Path(argument).exists():  # folder names may contain a colon
        return MixPart(Path(argument), None)
    try:
        weight = float(tail)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        is_percent = tail[:-1].isdecimal() and tail.endswith("%")
        raise UserError(f"{argument!r}: the weight {tail!r} must be a positive number, such as 0.7",
                        Fix(words={argument: f"{head}:{int(tail[:-1]) / 100:g}"}) if is_percent else None)
    return MixPart(Path(head), weight)


def write_mix(parts: list[MixPart], output: Path, blend: BlendSettings | None = None, *,
              overwrite: bool = False) -> None:
    """Write an artifact of kind "tokens" with the sources of all parts and a `weight` each (sum 1). A blend
    selects sources by tags, and adds phases. Raises `UserError`: parts that disagree, weights for some parts
    only, a blend without sources, or an output that may not be replaced."""
    check_output_folder(output, KIND, overwrite)
    manifests = [read_tokens_manifest(part.path) for part in parts]
    # checks precede the first link
    _check_parts(parts, manifests)
    if blend:
        phases, _ = _allot_blend(manifests, blend)
        weights = combine_phases(phases)
    else:
        phases, weights = [], _compute_weights(parts, manifests)
    check_overlap([(part.path, manifest.content) for part, manifest in zip(parts, manifests, strict=True)])
    with create_artifact(output, KIND, overwrite=overwrite) as artifact:
        sources: list[dict[str, Any]] = []
        for part, manifest in zip(parts, manifests, strict=True):
            artifact.add_input(part.path)
            sources += _link_sources(artifact, part.path, manifest, weights)
        _copy_tokenizer(artifact, parts[0].path, manifests[0])
        shared = {field: manifests[0].content[field] for field in SHARED_FIELDS}
        artifact.content = {"content_version": CONTENT_VERSION, **shared}
        rules = [m.content.get("heldout") for m in manifests]
        if rules[0] is not None and all(rule == rules[0] for rule in rules):
            artifact.content["heldout"] = rules[0]
        artifact.content["sources"] = sources
        artifact.settings = {"parts": parts}
        if blend:
            artifact.content["phases"] = [{"name": p.name, "tokens": p.tokens, "blend": p.shares}
                                          for p in phases]
            artifact.settings |= {"blend": blend, "blend_sha256": sha256_file(blend.file)}
    _report_mix(sources, phases, [s["name"] for m in manifests for s in m.content["sources"]])
    print(f"wrote {output}")


def _copy_tokenizer(artifact: ArtifactWriter, folder: Path, manifest: Manifest) -> None:
    """Copy the tokenizer and check the copy against the manifest's hashes."""
    (artifact.path / "tokenizer").mkdir()
    for name in (f"tokenizer/{TOKENIZER_JSON}", f"tokenizer/{CONFIG_JSON}"):
        shutil.copyfile(folder / name, artifact.path / name)
        record = manifest.files.get(name)
        digest = record.digest if record is not None else "sha256:"
        if hash_file(artifact.path / name, parse_digest_algorithm(digest)) != digest:
            raise UserError(f"{folder / name}: is damaged, its hash is not that of the manifest; "
                            "pack the data again or restore it from a copy")


def _report_mix(sources: list[dict[str, Any]], phases: list[PhaseShares], names: list[str]) -> None:
    if phases:
        print("\n".join(format_shares(phases, sources)))
    for source in sources:
        print(f"{source['name']}: {source['weight']:.1%}, {source['splits'][TRAIN]['num_tokens']:,} "
              "tokens to train on")
    used = {source["name"] for source in sources}
    if unused := [name for name in names if name not in used]:
        print(f"left out, for the blend has no share for them: {', '.join(unused)}")


def _allot_blend(manifests: list[Manifest],
                 blend: BlendSettings) -> tuple[list[PhaseShares], list[dict[str, Any]]]:
    """Return shares per phase, and all source records. Raises `UserError`: the blend lacks sources, or
    repeats a source too often."""
    if problems := find_all_problems(blend):
        raise SettingsError("blend", problems)
    sources = [s for m in manifests for s in m.content["sources"]]
    phases = allot_shares(read_blend(blend.file), sources, blend.missing, blend.num_tokens)
    check_epochs(phases, sources, blend.max_epochs)
    return phases, sources


def _check_parts(parts: list[MixPart], manifests: list[Manifest]) -> None:
    for part, manifest in zip(parts, manifests, strict=True):
        _check_shared_fields(part.path, manifest, parts[0].path, manifests[0])
    names = Counter(s["name"] for m in manifests for s in m.content["sources"])
    if repeated := sorted(name for name, count in names.items() if count > 1):
        raise UserError(f"source {repeated[0]!r}: occurs in several folders; "
                        "pack it under another name (--input NAME=PATH)")
    if len({part.weight is None for part in parts}) > 1:
        raise UserError("FOLDER:WEIGHT: give a weight to every folder or to none; shares by tokens and by "
                        "weight cannot be compared",
                        Fix(words={str(p.path): f"{p.path}:1" for p in parts if p.weight is None}))


def _check_shared_fields(path: Path, manifest: Manifest, first_path: Path, first: Manifest) -> None:
    for name in SHARED_FIELDS:
        value, expected = manifest.content[name], first.content[name]
        if value == expected:
            continue
        problem: str | None = ""
        if name == "tokenizer_sha256":  # a file hash: another file may hold an equal tokenizer
            problem = find_difference(path / "tokenizer", first_path / "tokenizer")
            if problem is None:
                continue
        raise UserError(f"{path}: {name} is {value}, that of {first_path} is {expected}"
                        f"{f' ({problem})' if problem else ''}; pack both with one "
                        "--tokenizer and the same options")


def _compute_weights(parts: list[MixPart], manifests: list[Manifest]) -> dict[str, float]:
    """Return source -> weight: the part's share times the source's share within the part."""
    part_weights = []
    for part, manifest in zip(parts, manifests, strict=True):
        num_tokens = sum(s["splits"][TRAIN]["num_tokens"] for s in manifest.content["sources"])
        part_weights.append(float(num_tokens) if part.weight is None else part.weight)
    total = sum(part_weights) or 1.0
    weights: dict[str, float] = {}
    for manifest, part_weight in zip(manifests, part_weights, strict=True):
        sources = manifest.content["sources"]
        # a mix as a part has weights
        source_weights = [float(s.get("weight", s["splits"][TRAIN]["num_tokens"])) for s in sources]
        part_total = sum(source_weights) or 1.0
        for source, weight in zip(sources, source_weights, strict=True):
            weights[source["name"]] = part_weight / total * weight / part_total
    return weights


def _link_sources(artifact: ArtifactWriter, path: Path, manifest: Manifest,
                  weights: dict[str, float]) -> list[dict[str, Any]]:
    """Link the shards of a part's weighted sources; return source records."""
    sources = [s for s in manifest.content["sources"] if s["name"] in weights]
    folders = {s["name"] for s in sources}
    for name, record in manifest.files.items():
        if name.split("/")[0] in folders:
            target = artifact.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path / name, target)
            # a link has the input's bytes and hash: no second reading of terabytes
            artifact.hashed_files[name] = record
    return [{**s, "weight": weights[s["name"]]} for s in sources]
