"""`sov-data mix`: several artifacts of token shards as one, with weights;
the shards themselves are shared, not copied.

Shards are hard links to those of the inputs where the file system allows it, and copies elsewhere.  An
artifact is never changed in place, so a link cannot be pulled away from under a mix.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt

from data_prep.mixture.blend_file import (
    Missing, PhaseShares, allot_shares, check_epochs, combine_phases, find_blend, format_shares, read_blend)
from data_prep.shards.encode import CONFIG_JSON, TOKENIZER_JSON
from data_prep.shards.token_artifact import CONTENT_VERSION, KIND, TRAIN, check_overlap, read_tokens_manifest
from megatron_sov.base.artifacts import (
    ArtifactWriter, Manifest, check_output_folder, create_artifact, sha256_file)
from megatron_sov.base.digests import hash_file, parse_digest_algorithm
from megatron_sov.base.errors import Fix, UserError, choose_free_path
from megatron_sov.base.settings import (
    Flag, NotNegative, ProblemCode, SettingsError, SettingsProblem, add_options, find_all_problems,
    read_options)
from megatron_sov.chat.vocabulary import find_difference

SHARED_FIELDS = ("tokenizer_sha256", "vocab_size", "eos_id", "eod", "bos_id", "dtype")
"""What must be the same in all parts."""


@dataclass(frozen=True)
class MixPart:
    path: Path
    """Artifact of kind "tokens"."""
    weight: float | None
    """Its share of a run, relative to the others; None: by its tokens."""


@dataclass(frozen=True, kw_only=True)
class BlendLimits:
    """How a blend becomes shares of sources."""

    num_tokens: Annotated[NotNegative, Flag("--tokens", "N")] = 0
    """--blend: tokens of all phases together (default: as the blend says)."""
    max_epochs: Annotated[float, Gt(0), Flag(value="N")] = 4.0
    """--blend: refuse to read a source more often than this; what is gained beyond four passes is little
    (arXiv 2305.16264)."""
    missing: Missing = "refuse"
    """--blend: shares that no source is for: refuse the blend, or give them to the others of their
    phase."""


@dataclass(frozen=True, kw_only=True)
class BlendSettings(BlendLimits):
    """A blend, and how it becomes shares of sources."""

    file: Path


@dataclass(frozen=True, kw_only=True)
class MixOptions(BlendLimits):
    """Join token shards of several folders into one."""

    data: Annotated[tuple[str, ...], Flag("DIR[:WEIGHT]")]
    """Folder that `sov-data pack` or `sov-data mix` wrote."""
    output: Annotated[Path | None, Flag(value="DIR")] = None
    """Folder for the mix."""
    blend: Annotated[str | None, Flag(value="FILE|NAME")] = None
    """Shares of each phase by kind, level, synthetic or name; a YAML file, or one that is shipped
    (solar-open, k-exaone)."""
    dry_run: bool = False
    """--blend: print shares and epochs, and write nothing."""
    overwrite: bool = False
    """Replace what is already there."""

    @property
    def limits(self) -> BlendLimits:
        return BlendLimits(num_tokens=self.num_tokens, max_epochs=self.max_epochs, missing=self.missing)

    def problems(self) -> list[SettingsProblem]:
        """Return what does not fit together, or would have no effect."""
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Join token shards of several folders into one. A weight is the folder's share of "
                          "a run relative to the others; without weights the tokens decide. "
                          "Within a folder its own weights, or tokens, decide. --blend shares each phase of "
                          "a curriculum out by the tags of the sources.")
    add_options(parser, MixOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(MixOptions, typed)
    parts = [parse_part(a) for a in args.data]
    _refuse_idle_options(args, parts)
    blend = BlendSettings(file=find_blend(args.blend), **vars(args.limits)) if args.blend else None
    if args.dry_run:
        assert blend is not None
        print("\n".join(format_shares(*_allotted([read_tokens_manifest(p.path) for p in parts], blend))))
        return 0
    assert args.output is not None
    write_mix(parts, args.output, blend, overwrite=args.overwrite)
    return 0


def _refuse_idle_options(args: MixOptions, parts: list[MixPart]) -> None:
    """Refuse what would have no effect.

    Raises:
        UserError: naming it.
    """
    weighted = [part for part in parts if part.weight is not None]
    if weighted and args.blend:
        raise UserError(f"{weighted[0].path}:{weighted[0].weight:g}: folders have no weights beside "
                        "--blend, which says every share; leave the weight out")


def parse_part(argument: str) -> MixPart:
    """Read `DIR[:WEIGHT]`.

    Raises:
        UserError: the weight is not a positive number.
    """
    head, colon, tail = argument.rpartition(":")
    # A folder whose name has a colon is that folder.
    match = re.fullmatch(r"(.+)=([\d.]+%?)", argument)
    if match and not Path(argument).exists():
        raise UserError(f"{argument!r}: a weight follows its folder after a colon",
                        Fix(words={argument: f"{match[1]}:{match[2]}"}))
    if not colon or Path(argument).exists():
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
    """Write an artifact of kind "tokens" that holds the sources of all parts,
    each with its `weight` (they sum to 1).

    Args:
        parts: folders of token shards.
        output: the new artifact.
        blend: shares by tags; the mix then holds the sources that they name, and the phases.
        overwrite: replace an artifact that is already there.

    Raises:
        UserError: parts that do not fit together, weights for some only, a blend that cannot be had, or an
            output that may not be replaced.
    """
    check_output_folder(output, KIND, overwrite)
    manifests = [read_tokens_manifest(part.path) for part in parts]
    # All that can be refused is refused before the first link.
    _check_fit(parts, manifests)
    phases = _allotted(manifests, blend)[0] if blend else []
    weights = combine_phases(phases) if blend else _weights(parts, manifests)
    check_overlap([(part.path, manifest.content) for part, manifest in zip(parts, manifests, strict=True)])
    with create_artifact(output, KIND, overwrite=overwrite) as artifact:
        sources: list[dict[str, Any]] = []
        for part, manifest in zip(parts, manifests, strict=True):
            artifact.add_input(part.path)
            sources += _take(artifact, part.path, manifest, weights)
        (artifact.path / "tokenizer").mkdir()
        for name in (f"tokenizer/{TOKENIZER_JSON}", f"tokenizer/{CONFIG_JSON}"):
            shutil.copyfile(parts[0].path / name, artifact.path / name)
            record = manifests[0].files.get(name)
            known = record.digest if record is not None else "sha256:"
            # The copy is hashed, since it is what the mix will be read with.
            if hash_file(artifact.path / name, parse_digest_algorithm(known)) != known:
                raise UserError(f"{parts[0].path / name}: is damaged, its hash is not that of the manifest; "
                                "pack the data again or restore it from a copy")
        shared = {field: manifests[0].content[field] for field in SHARED_FIELDS}
        artifact.content = {"content_version": CONTENT_VERSION, **shared, **_rule(manifests),
                            "sources": sources}
        artifact.settings = {"parts": parts}
        if blend:
            artifact.content["phases"] = [{"name": p.name, "tokens": p.tokens, "blend": p.shares}
                                          for p in phases]
            artifact.settings |= {"blend": blend, "blend_sha256": sha256_file(blend.file)}
    _tell(sources, phases, [s["name"] for m in manifests for s in m.content["sources"]])
    print(f"wrote {output}")


def _tell(sources: list[dict[str, Any]], phases: list[PhaseShares], names: list[str]) -> None:
    if phases:
        print("\n".join(format_shares(phases, sources)))
    for source in sources:
        print(f"{source['name']}: {source['weight']:.1%}, {source['splits'][TRAIN]['num_tokens']:,} "
              "tokens to train on")
    if left := [name for name in names if name not in {s["name"] for s in sources}]:
        print(f"left out, for the blend has no share for them: {', '.join(left)}")


def _allotted(manifests: list[Manifest],
              blend: BlendSettings) -> tuple[list[PhaseShares], list[dict[str, Any]]]:
    """Return the shares of a blend's phases, and the records of all sources.

    Raises:
        UserError: a blend that cannot be had, or sources that would be repeated too often.
    """
    if problems := find_all_problems(blend):
        raise SettingsError("blend", problems)
    sources = [s for m in manifests for s in m.content["sources"]]
    phases = allot_shares(read_blend(blend.file), sources, blend.missing, blend.num_tokens)
    check_epochs(phases, sources, blend.max_epochs)
    return phases, sources


def _check_fit(parts: list[MixPart], manifests: list[Manifest]) -> None:
    first = parts[0].path
    for part, manifest in zip(parts, manifests, strict=True):
        for name in SHARED_FIELDS:
            found, wanted = manifest.content[name], manifests[0].content[name]
            if found == wanted:
                continue
            problem: str | None = ""
            if name == "tokenizer_sha256":  # hash of a file; the same tokenizer may be written otherwise
                problem = find_difference(part.path / "tokenizer", first / "tokenizer")
                if problem is None:
                    continue
            raise UserError(f"{part.path}: {name} is {found}, that of {first} is {wanted}"
                            f"{f' ({problem})' if problem else ''}; pack both with one "
                            "--tokenizer and the same options")
    names = [s["name"] for m in manifests for s in m.content["sources"]]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"source {twice[0]!r}: occurs in several folders; "
                        "pack it under another name (--input NAME=PATH)")
    if len({part.weight is None for part in parts}) > 1:
        raise UserError("FOLDER:WEIGHT: give a weight to every folder or to none; shares by tokens and by "
                        "weight cannot be compared",
                        Fix(words={str(p.path): f"{p.path}:1" for p in parts if p.weight is None}))


def _rule(manifests: list[Manifest]) -> dict[str, Any]:
    rules = [m.content.get("heldout") for m in manifests]
    return {"heldout": rules[0]} if rules[0] is not None and all(r == rules[0] for r in rules) else {}


def _weights(parts: list[MixPart], manifests: list[Manifest]) -> dict[str, float]:
    raw = [float(sum(s["splits"][TRAIN]["num_tokens"] for s in m.content["sources"])) if p.weight is None
           else p.weight for p, m in zip(parts, manifests, strict=True)]
    weights: dict[str, float] = {}
    for manifest, share in zip(manifests, raw, strict=True):
        sources = manifest.content["sources"]
        # Of a part that is a mix itself, its own weights decide within its share.
        inner = [float(s.get("weight", s["splits"][TRAIN]["num_tokens"])) for s in sources]
        weights |= {s["name"]: share / (sum(raw) or 1.0) * w / (sum(inner) or 1.0)
                    for s, w in zip(sources, inner, strict=True)}
    return weights


def _take(artifact: ArtifactWriter, path: Path, manifest: Manifest,
          weights: dict[str, float]) -> list[dict[str, Any]]:
    sources = [s for s in manifest.content["sources"] if s["name"] in weights]
    folders = {s["name"] for s in sources}
    for name, record in manifest.files.items():
        if name.split("/")[0] in folders:
            target = artifact.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path / name, target)
            # A link has the bytes of its source: their hash is known, and terabytes are not read.
            artifact.hashed_files[name] = record
    return [{**s, "weight": weights[s["name"]]} for s in sources]


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy where links are not possible.

    Raises:
        UserError: `source` is missing.
    """
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise UserError(f"{source}: is missing; pack the data again or restore it from a copy") from None
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(source, target)
