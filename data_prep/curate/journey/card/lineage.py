"""What an artifact was made from, back to the corpora and their figures; manifests are checked on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.curate.journey.facts import TEXT, Facts, facts_of_output
from data_prep.curate.journey.summary import SUMMARY, JourneySummary, read_summary
from data_prep.shards.token_artifact import KIND as TOKENS, read_tokens_manifest
from data_prep.tags import CORPUS, SYNTHESIS, Tags, tags_of
from megatron_sov.base.artifacts import (
    MANIFEST, Manifest, damaged_files, find_input, inputs_of, manifest_sha256, read_manifest)
from megatron_sov.base.digests import BLAKE3
from megatron_sov.base.errors import UserError
from megatron_sov.base.sealed import read_json

# The raw files that a corpus was made of, with their hashes, as far as its folder has them.

INPUTS = "inputs"
"""Folder of a pipeline's output that keeps the hashes of a source's files; no part of the artifact."""
MAX_LISTED = 1_000
"""Files of a source that are listed one by one; the hash over all of them stands beside."""
MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class RawFiles:
    """The files of one source."""

    source: str
    """Name of the source."""
    told_by: str
    """File of the corpus' folder that has the hashes."""
    num_files: int
    size_bytes: int
    sha256: str
    """Over name and hash of each file, in order of the names."""
    listed: tuple[dict[str, Any], ...]
    """`name`, `size_bytes` and `digest` of the first ones."""


def raw_files(corpus: Path, manifest: Manifest, sources: list[str]) -> list[RawFiles]:
    """Return the raw files of a corpus; none of a source whose hashes are not there.

    Args:
        corpus: the folder.
        manifest: what it says.
        sources: names of the sources of its pipeline; none: its own files are the text.

    Raises:
        UserError: a list of hashes is damaged.
    """
    if not sources:
        own = [(name, record.size_bytes, record.digest) for name, record in sorted(manifest.files.items())]
        return [_described(corpus.name, MANIFEST, own)] if own else []
    found = []
    for source in sources:
        file = corpus / INPUTS / f"{source}.json"
        if file.resolve().parent == (corpus / INPUTS).resolve() and file.is_file():
            found.append(_described(source, f"{INPUTS}/{file.name}", _read(file)))
    return found


def _read(file: Path) -> list[tuple[str, int, str]]:
    """Return name, size in bytes and hash of each file that `addresses.entries_of` has listed, by name.

    The card is public, so the folders of the files are left out.
    """
    way_out = "delete it and run the pipeline again; without it the card calls the hashes not recorded"
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        # Each entry is [size, times and inode ..., hash]: `addresses.Mark` may grow between its ends.
        return sorted((path.rpartition("/")[2], int(entry[0]), f"{BLAKE3}:{entry[-1]}")
                      for path, entry in read_json(file, way_out).items())
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as e:
        raise UserError(f"{file}: is damaged ({e}); {way_out}") from None


def _described(source: str, told_by: str, files: list[tuple[str, int, str]]) -> RawFiles:
    whole = hashlib.sha256(json.dumps([[name, digest] for name, _, digest in files]).encode()).hexdigest()
    return RawFiles(source, told_by, len(files), sum(size for _, size, _ in files), whole, tuple(
        {"name": name, "size_bytes": size, "digest": digest} for name, size, digest in files[:MAX_LISTED]))


MAX_ARTIFACTS = 1_000
"""Of one lineage; a longer one is no honest one."""


@dataclass(frozen=True)
class Origin:
    """One artifact of a lineage."""

    kind: str
    name: str
    """Of its folder; where it lies is nobody's business."""
    sha256: str
    """Hash of its manifest, which stands for the whole."""
    created_s: float
    """Unix time; 0: its manifest does not say."""
    made_from: tuple[str, ...] = ()
    """Hashes of the manifests of what it was made from."""


@dataclass(frozen=True)
class CorpusRecord:
    """A corpus that `sov-data run` wrote."""

    origin: Origin
    summary: JourneySummary
    facts: dict[str, Facts]
    """Output source -> what its documents are."""
    raw: list[RawFiles]
    """What it was made of, as far as its folder tells."""


@dataclass(frozen=True)
class SynthesisRecord:
    """Samples that `sov-data synth` has made."""

    origin: Origin
    generator: str
    """Name of the generator."""
    version: int
    """Of the generator."""
    model: str
    """That wrote them, as its endpoint calls it."""
    judge: str
    """That judged them; empty: none of its own."""
    num_kept: int
    """Samples that are data."""
    num_rejected: int
    """Samples that are not."""
    licences: dict[str, int]
    """Licence of what they were made from -> kept samples; empty: nobody has stated it."""


@dataclass(frozen=True)
class TokenSource:
    """A source of token shards."""

    artifact_sha256: str
    """Hash of the shards' manifest."""
    name: str
    num_tokens: int
    num_documents: int
    weight: float | None
    """Its share of a run, where a mix gives one."""
    input_sha256: str
    """Over the files that it was packed from."""
    tags: Tags = field(default_factory=dict)
    """What it was packed as."""


@dataclass(frozen=True)
class DataLineage:
    """Artifacts, and all that they were made from."""

    artifacts: list[Origin]
    """Those that were asked for."""
    corpora: list[CorpusRecord]
    origins: list[Origin]
    """Everything on the way, the first artifact first."""
    token_sources: list[TokenSource] = field(default_factory=list)
    """Empty: it is no artifact of tokens."""
    tokenizers: list[str] = field(default_factory=list)
    """Hashes of those that counted the tokens."""
    unknown: list[str] = field(default_factory=list)
    """One sentence for each thing that could not be followed."""
    other_corpora: list[tuple[Origin, RawFiles]] = field(default_factory=list)
    """Corpora that no pipeline wrote, with their own files."""
    syntheses: list[SynthesisRecord] = field(default_factory=list)
    """Samples of models among what they were made from."""


class _DataWalk:
    """Follows inputs; each artifact once."""

    def __init__(self, elsewhere: Iterable[Path]) -> None:
        self._elsewhere = {manifest_sha256(path): path for path in elsewhere}
        self.corpora: list[CorpusRecord] = []
        self.origins: list[Origin] = []
        self.other_corpora: list[tuple[Origin, RawFiles]] = []
        self.syntheses: list[SynthesisRecord] = []
        self.unknown: list[str] = []
        self._seen: set[str] = set()

    def visit(self, path: Path, manifest: Manifest) -> None:
        sha256 = manifest_sha256(path)
        if sha256 in self._seen:
            return
        if len(self._seen) >= MAX_ARTIFACTS:
            raise UserError(f"{path}: was made from more than {MAX_ARTIFACTS:,} artifacts; nothing of this "
                            "house is, so look at its manifest")
        # Noted before its inputs are followed: manifests that name each other in a circle end here.
        self._seen.add(sha256)
        # Its place in the list comes before those of its inputs; what it was made from is filled in after
        # them.
        place = len(self.origins)
        self.origins.append(origin := Origin(manifest.kind, path.resolve().name, sha256, manifest.created_s))
        if manifest.kind == CORPUS:
            self._corpus(path, manifest, origin)
        if manifest.kind == SYNTHESIS:
            self.syntheses.append(_synthesis(path, manifest, origin))
        inputs, around = inputs_of(path, manifest), None
        if manifest.kind == TOKENS:
            around = self._packed_by_around(path, sha256)
            if around is not None:
                # The corpus around it names these shards, and not they it: its own input of this kind is that
                # corpus.
                inputs = [item for item in inputs if item["kind"] != CORPUS]
            elif not any(item["kind"] in (CORPUS, TOKENS, SYNTHESIS) for item in inputs):
                self.unknown.append(f"tokens {origin.name!r}: the manifest names no corpus")
        for item in inputs:
            self._input(path, item)
        made_from = [*([around] if around is not None else []), *(item["manifest_sha256"] for item in inputs)]
        self.origins[place] = replace(origin, made_from=tuple(made_from))

    def _input(self, path: Path, item: dict[str, str]) -> None:
        """Follow one input to where it lies now, if it is what it was."""
        found = find_input(item["path"], item["manifest_sha256"], path, self._elsewhere)
        if found is not None:
            self.visit(found, read_manifest(found))
            return
        name = Path(item["path"]).name
        self.origins.append(Origin(item["kind"], name, item["manifest_sha256"], 0.0))
        if item["kind"] in (CORPUS, TOKENS, SYNTHESIS):
            self.unknown.append(f"{item['kind']} {name!r} (manifest {item['manifest_sha256'][:12]}) is not "
                                "where it was, or is no longer the same")

    def _packed_by_around(self, path: Path, sha256: str) -> str | None:
        """Follow token shards that a pipeline packed itself, before its own manifest: that names theirs.
        Returns the hash of that; None: they are not such shards."""
        around = path.absolute().parent
        if not (around / MANIFEST).is_file():
            return None
        manifest = read_manifest(around)
        if manifest.kind != CORPUS or manifest.content.get("tokens_manifest_sha256") != sha256:
            return None
        self.visit(around, manifest)
        return manifest_sha256(around)

    def _corpus(self, path: Path, manifest: Manifest, origin: Origin) -> None:
        if SUMMARY not in manifest.files:
            self.unknown.append(f"corpus {origin.name!r} was not made by `sov-data run`; only its hashes are "
                                "known")
            self.other_corpora += [(origin, raw) for raw in raw_files(path, manifest, [])]
            return
        counted = [name for name in manifest.files
                   if name == SUMMARY or (name.startswith(f"{TEXT}/") and name.endswith(".json"))]
        # Only files that figures are read from are hashed: hashing all text would take as long as making it.
        if damaged := damaged_files(path, counted):
            raise UserError(f"{damaged[0]}; a card tells nothing that its manifest does not vouch for, so "
                            "run the pipeline again or restore the file")
        facts = facts_of_output(path)
        for what, found in (("num_documents", sum(f.num_documents for f in facts.values())),
                            ("num_bytes", sum(f.num_bytes for f in facts.values()))):
            if manifest.content.get(what, found) != found:
                raise UserError(f"{path}: its manifest says {what} = {manifest.content[what]:,}, its shards "
                                f"hold {found:,}; run the pipeline again or restore the shards")
        summary = read_summary(path)
        self.corpora.append(CorpusRecord(origin, summary, facts, raw_files(
            path, manifest, [source.name for source in summary.sources])))


def _synthesis(path: Path, manifest: Manifest, origin: Origin) -> SynthesisRecord:
    content = manifest.content
    try:
        return SynthesisRecord(
            origin, str(content["generator"]), int(content["generator_version"]), str(content["model"]),
            str(content["judge"]), int(content["num_kept"]), int(content["num_rejected"]),
            {str(licence): int(num) for licence, num in content["licences"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path / MANIFEST}: is damaged ({type(e).__name__}: {e}); run the same `sov-data "
                        "synth` again") from None


def lineage(paths: Sequence[Path], elsewhere: Sequence[Path] = ()) -> DataLineage:
    """Return what artifacts were made from.

    Args:
        paths: corpora and token shards; what another one of them was made from counts once.
        elsewhere: corpora and token shards that lie no longer where the manifests say.

    Raises:
        UserError: one is neither, a figure does not fit its hash, or a manifest is damaged.
    """
    for path in paths:
        _refuse_other_kinds(path)
    given = {manifest_sha256(path): path for path in paths}
    # A wrong --from is refused even where the walk does not come to it.
    for other in elsewhere:
        read_manifest(other)
    walk = _DataWalk(elsewhere)
    for path in given.values():
        walk.visit(path, read_manifest(path))
    # What is part of another one that was asked for counts once, with that.
    inside = {sha256 for origin in walk.origins for sha256 in origin.made_from}
    tops = {sha256: path for sha256, path in given.items() if sha256 not in inside}
    sources: list[TokenSource] = []
    tokenizers: list[str] = []
    for sha256, path in tops.items():
        if read_manifest(path).kind == TOKENS:
            content = read_tokens_manifest(path).content
            tokenizers.append(content["tokenizer_sha256"])
            sources += [TokenSource(
                sha256, s["name"], sum(p["num_tokens"] for p in s["splits"].values()),
                sum(p["num_documents"] for p in s["splits"].values()),
                # Weights of several mixes are not shares of one run.
                s.get("weight") if len(tops) == 1 else None, str(s.get("input_sha256", "")), tags_of(s))
                for s in content["sources"]]
    return DataLineage([o for o in walk.origins if o.sha256 in tops], walk.corpora, walk.origins, sources,
                       list(dict.fromkeys(tokenizers)), walk.unknown, walk.other_corpora, walk.syntheses)


def _refuse_other_kinds(path: Path) -> None:
    if (kind := read_manifest(path).kind) not in (CORPUS, TOKENS, SYNTHESIS):
        raise UserError(f"{path}: is a '{kind}' artifact; pass what `sov-data run`, `sov-data synth`, "
                        "`sov-data pack` or `sov-data mix` wrote")
