"""`sov-data mix`: several artifacts of token shards as one, with weights;
the shards themselves are shared, not copied.

Shards are hard links to those of the inputs where the file system allows it, and copies elsewhere.  An
artifact is never changed in place, so a link cannot be pulled away from under a mix.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.encode import CONFIG_JSON, TOKENIZER_JSON
from data_prep.overlap import refuse_overlap
from data_prep.splits import TRAIN
from data_prep.token_artifact import CONTENT_VERSION, KIND, read_tokens_manifest
from megatron_sov.artifacts import ArtifactWriter, Manifest, new_artifact, refuse_existing
from megatron_sov.errors import UserError

HELP = "join token shards of several folders into one, with weights"
SHARED_FIELDS = ("tokenizer_sha256", "vocab_size", "eos_id", "eod", "bos_id", "dtype")
"""What must be the same in all parts."""


@dataclass(frozen=True)
class Part:
    """One folder of a mix."""

    path: Path
    """Artifact of kind "tokens"."""
    weight: float | None
    """Its share of a run, relative to the others; None: by its tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = ("Join token shards of several folders into one. A weight is the folder's share of "
                          "a run relative to the others; without weights the tokens decide. "
                          "Within a folder its own weights, or tokens, decide.")
    parser.add_argument("data", nargs="+", metavar="DIR[:WEIGHT]",
                        help="folder that `sov-data pack` or `sov-data mix` wrote")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the mix")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace token shards that are already there")


def run(args: argparse.Namespace) -> int:
    """Run `sov-data mix`; returns 0."""
    mix([parse_part(a) for a in args.data], args.output, overwrite=args.overwrite)
    return 0


def parse_part(argument: str) -> Part:
    """Read `DIR[:WEIGHT]`.

    Raises:
        UserError: the weight is not a positive number.
    """
    head, colon, tail = argument.rpartition(":")
    if not colon or Path(argument).exists():
        return Part(Path(argument), None)
    try:
        weight = float(tail)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise UserError(f"{argument!r}: the weight {tail!r} must be a positive number, e.g. {head}:0.5")
    return Part(Path(head), weight)


def mix(parts: list[Part], output: Path, *, overwrite: bool = False) -> None:
    """Write an artifact of kind "tokens" that holds the sources of all parts,
    each with its `weight` (they sum to 1).

    Raises:
        UserError: parts that do not fit together, weights for some only, or an output that
            may not be replaced.
    """
    refuse_existing(output, KIND, overwrite)
    manifests = [read_tokens_manifest(part.path) for part in parts]
    _check_fit(parts, manifests)
    refuse_overlap([(part.path, manifest.content) for part, manifest in zip(parts, manifests, strict=True)])
    with new_artifact(output, KIND, overwrite=overwrite) as artifact:
        sources: list[dict[str, Any]] = []
        for part, manifest, share in zip(parts, manifests, _shares(parts, manifests), strict=True):
            artifact.add_input(part.path)
            sources += _take(artifact, part.path, manifest, share)
        (artifact.path / "tokenizer").mkdir()
        for name in (TOKENIZER_JSON, CONFIG_JSON):
            shutil.copyfile(parts[0].path / "tokenizer" / name, artifact.path / "tokenizer" / name)
        shared = {field: manifests[0].content[field] for field in SHARED_FIELDS}
        artifact.content = {"content_version": CONTENT_VERSION, **shared, **_rule(manifests),
                            "sources": sources}
        artifact.settings = {"parts": parts}
    for source in sources:
        print(f"{source['name']}: {source['weight']:.1%}, {source['splits'][TRAIN]['num_tokens']:,} "
              "tokens to train on")
    print(f"wrote {output}")


def _check_fit(parts: list[Part], manifests: list[Manifest]) -> None:
    first = parts[0].path
    for part, manifest in zip(parts, manifests, strict=True):
        for field in SHARED_FIELDS:
            found, wanted = manifest.content[field], manifests[0].content[field]
            if found != wanted:
                raise UserError(f"{part.path}: {field} is {found}, that of {first} is {wanted}; "
                                "pack both in the same way")
    names = [s["name"] for m in manifests for s in m.content["sources"]]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"source {twice[0]!r}: occurs in several folders; "
                        "pack it under another name (--input NAME=PATH)")
    if len({part.weight is None for part in parts}) > 1:
        raise UserError("give a weight to every folder or to none: those by tokens and those by weight "
                        "cannot be compared")


def _rule(manifests: list[Manifest]) -> dict[str, Any]:
    """Return the held-out rule that all parts share, if they do."""
    rules = [m.content.get("heldout") for m in manifests]
    return {"heldout": rules[0]} if rules[0] is not None and all(r == rules[0] for r in rules) else {}


def _shares(parts: list[Part], manifests: list[Manifest]) -> list[float]:
    """Return each part's share of a run."""
    raw = [float(sum(s["splits"][TRAIN]["num_tokens"] for s in m.content["sources"])) if p.weight is None
           else p.weight for p, m in zip(parts, manifests, strict=True)]
    return [r / (sum(raw) or 1.0) for r in raw]


def _take(artifact: ArtifactWriter, path: Path, manifest: Manifest, share: float) -> list[dict[str, Any]]:
    """Link a part's shards into the mix; returns the records of its sources."""
    sources = manifest.content["sources"]
    inner = [float(s.get("weight", s["splits"][TRAIN]["num_tokens"])) for s in sources]
    folders = {s["name"] for s in sources}
    for name, record in manifest.files.items():
        if name.split("/")[0] in folders:
            target = artifact.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path / name, target)
            artifact.known_files[name] = record
    return [{**s, "weight": share * w / (sum(inner) or 1.0)} for s, w in zip(sources, inner, strict=True)]


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
