"""What a run has published of itself: a log that only grows, of hashes that stand for settings, code, data
and checkpoints, and reveal nothing of them but the paths of the data.

A line of the log is an entry.  It names what has come since the one before, the hash of that line, and the
root of the Merkle tree over all leaves so far (RFC 6962, section 2.1), so that one number stands for
everything: this is what a timestamp from outside, or a newspaper, takes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sov.audit.documents import DocumentProof, documents_root, prove_document, read_document_proof
from megatron_sov.audit.merkle import inclusion_path, merkle_root, root_by_path
from megatron_sov.base.artifacts import (
    MANIFEST, FileRecord, atomic_write, file_damage, manifest_sha256, sha256_file, to_json)
from megatron_sov.base.digests import code_sha256
from megatron_sov.base.errors import UserError, how_to_install
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.data import named_shards
from megatron_sov.runs import checkpoints
from megatron_sov.runs.checkpoints import refuse_no_run
from megatron_sov.runs.folder import CONFIG, RunFolder, read_command
from megatron_sov.runs.obs.events import EVENTS, read_events

SETTINGS, CODE, DATA, START, CHECKPOINT = "settings", "code", "data", "start", "checkpoint"
TEACHER, REFERENCE, DOCUMENTS = "teacher", "reference", "documents"
KINDS = (SETTINGS, CODE, DATA, START, TEACHER, REFERENCE, DOCUMENTS, CHECKPOINT)
"""Kinds of leaves; `TEACHER` is what a teacher said of the data, `REFERENCE` another model that preferences
were compared with than the one of the start, `DOCUMENTS` the root of the documents of data (`documents`)."""
STATES_KIND = "teacher_states"
"""What artifacts of `TEACHER` are, as records and manifests call them."""
HASH, STEP = re.compile(r"[0-9a-f]{64}"), re.compile(r"[1-9][0-9]{0,11}")
"""What a log that others wrote may hold."""
SIGNATURE = ".minisig"
FORMAT = 1


@dataclass(frozen=True)
class Leaf:
    """One thing that is published by its hash."""

    kind: str
    name: str
    """Of data [NAME=]folder as the settings have it, of a checkpoint its step, of documents the hash of the
    manifest of their data; else empty."""
    sha256: str

    def line(self) -> bytes:
        """Return what is hashed in the tree."""
        return f"{self.kind} {self.name} {self.sha256}".encode()

    def line_sha256(self) -> str:
        return hashlib.sha256(self.line()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One line of the log."""

    number: int
    previous: str
    """Hash of the line before; empty in the first."""
    run: str
    """Name of the run's folder."""
    written: str
    """By the lab's clock, which proves nothing: UTC."""
    leaves: tuple[Leaf, ...]
    """What is new."""
    root: str
    """Of the Merkle tree over all leaves of the log so far."""

    def line(self) -> str:
        """Return the text of the line, with no end."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)


@dataclass(frozen=True)
class Commitment:
    """A log that was read, whose lines hang together."""

    file: Path
    entries: tuple[Entry, ...]

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(leaf for entry in self.entries for leaf in entry.leaves)

    @property
    def root(self) -> str:
        return self.entries[-1].root

    def find(self, kind: str) -> list[Leaf]:
        """Return the leaves of a kind, in the order in which they were published."""
        return [leaf for leaf in self.leaves if leaf.kind == kind]

    def checkpoint(self, step: int) -> str | None:
        """Return what was published of a checkpoint; None: nothing."""
        return next((leaf.sha256 for leaf in self.find(CHECKPOINT) if leaf.name == str(step)), None)


@dataclass(frozen=True)
class InclusionProof:
    """That one leaf was published: it leads to the root, without the others."""

    leaf: Leaf
    index: int
    """Place of the leaf, from 0."""
    size: int
    """Leaves of the log."""
    path: tuple[str, ...]
    """As `inclusion_path` returns it."""
    manifest: str
    """Text of the manifest whose hash the leaf is, where a file of the artifact is asked for; of the one that
    the leaf names, where a document is; else empty."""
    document: DocumentProof | None = None
    """That a document leads to the leaf's hash."""

    def root(self) -> str:
        """Return the root to which it leads; `ValueError` where it leads nowhere."""
        if self.document is not None and (
                self.leaf.kind != DOCUMENTS or self.document.root() != self.leaf.sha256):
            raise ValueError("its document does not lead to its line")
        return root_by_path(self.leaf.line(), self.index, self.size, self.path)

    def records(self) -> list[FileRecord]:
        """Return what the manifest has of files.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is no manifest, or not the leaf's.
        """
        if not self.manifest:
            return []
        published = self.leaf.sha256 if self.document is None else self.leaf.name
        if hashlib.sha256(self.manifest.encode()).hexdigest() != published:
            raise ValueError("its manifest is not the one that was published")
        return [FileRecord.read(record) for record in json.loads(self.manifest)["files"].values()]

    def proves(self, file: Path) -> bool:
        """Return whether a file is the manifest that was published, or one of those that it names, by its
        content, whatever it is called now."""
        return sha256_file(file) == self.leaf.sha256 or any(
            file_damage(file, record) is None for record in self.records())


def artifact_around(place: Path) -> Path | None:
    """Return the folder whose manifest names a file, or the folder itself; None: there is none."""
    above = (place, *place.absolute().parents) if place.exists() else ()
    return next((folder for folder in above if (folder / MANIFEST).is_file()), None)


def prove_inclusion(commitment: Commitment, what: str) -> InclusionProof:
    """Return the proof that something was published.

    Args:
        commitment: the log.
        what: the hash of a leaf, a folder whose manifest has it, or a file of such a folder.

    Raises:
        UserError: it is none of these, or was not published.
    """
    place, text, sha256 = Path(what), "", what
    if not HASH.fullmatch(what):
        folder = artifact_around(place)
        if folder is None:
            raise UserError(f"{what}: is neither a hash of 64 digits, nor a folder with a {MANIFEST}, nor a "
                            "file of one")
        sha256 = manifest_sha256(folder)
        text = (folder / MANIFEST).read_text(encoding="utf-8") if place.is_file() else ""
    index = next((i for i, leaf in enumerate(commitment.leaves) if leaf.sha256 == sha256), None)
    if index is None:
        raise UserError(f"{commitment.file}: has no line with {sha256}, so that nothing was published of "
                        f"{what}")
    found = _proof_of_leaf(commitment, index, text)
    if place.is_file() and not found.proves(place):
        raise UserError(f"{what}: is not the file that its {MANIFEST} names; restore it")
    return found


def _proof_of_leaf(commitment: Commitment, index: int, manifest: str) -> InclusionProof:
    lines = [leaf.line() for leaf in commitment.leaves]
    return InclusionProof(commitment.leaves[index], index, len(lines), tuple(inclusion_path(lines, index)),
                          manifest)


def prove_published_document(commitment: Commitment, shards: Path, named: str) -> InclusionProof:
    """Return the proof that a document of published data was published.

    Args:
        commitment: the log.
        shards: folder of token shards.
        named: SOURCE:NUMBER, one of its training documents.

    Raises:
        UserError: there is none, or nothing was published of the documents.
    """
    name = manifest_sha256(shards) if (shards / MANIFEST).is_file() else ""
    leaf = next((leaf for leaf in commitment.find(DOCUMENTS) if leaf.name == name), None)
    if leaf is None:
        raise UserError(f"{commitment.file}: has no line for the documents of {shards}; name a folder of "
                        "token shards of which `audit commit --documents` published them")
    document = prove_document(shards, named)
    if document.root() != leaf.sha256:
        raise UserError(f"{shards}: its documents are not those that were published; restore them")
    # of this data: another folder may hold the same documents, and have the same root
    proof = _proof_of_leaf(commitment, commitment.leaves.index(leaf),
                           (shards / MANIFEST).read_text(encoding="utf-8"))
    return dataclasses.replace(proof, document=document)


def write_proof(file: Path, proof: InclusionProof) -> None:
    atomic_write(file, to_json({"format": FORMAT, **asdict(proof)}) + "\n")


def read_proof(file: Path) -> InclusionProof:
    """Return a proof that was written, which leads to some root.

    Raises:
        UserError: it is none.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise ValueError(f"format is {raw['format']!r}, must be {FORMAT}")
        # proofs of earlier versions know no documents
        document = raw.get("document") and read_document_proof(raw["document"])
        proof = InclusionProof(_leaf(raw["leaf"]), int(raw["index"]), int(raw["size"]),
                               tuple(map(str, raw["path"])), str(raw["manifest"]), document)
        proof.root()
        proof.records()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as e:
        raise UserError(f"{file}: is no proof of `megatron-sov audit prove` ({str(e)[:200]}); ask for it "
                        "again") from None
    return proof


def settings_sha256(config: RunConfig) -> str:
    """Return the hash of settings, however they are written."""
    return hashlib.sha256(to_json(config.to_dict()).encode()).hexdigest()


def leaves_of(run: Path) -> list[Leaf]:
    """Return what a run has to publish by now.

    Raises:
        UserError: it is no run, or its data are not where they were.
    """
    folder = RunFolder(run)
    config = folder.config()
    if config is None:
        refuse_no_run(run)
        raise AssertionError
    written = [config, *map(checkpoints.settings_of, checkpoints.complete(folder.checkpoints))]
    found = [Leaf(SETTINGS, "", sha256) for sha256 in dict.fromkeys(map(settings_sha256, written))]
    found.append(Leaf(CODE, "", code_sha256()))
    found += [Leaf(DATA, given, manifest_sha256(place)) for given, place in data_folders(run).items()]
    found += [Leaf(START, "", sha256) for sha256 in [start_of(run)] if sha256]
    found += [Leaf(kind, "", sha256) for kind, called in ((TEACHER, STATES_KIND), (REFERENCE, REFERENCE))
              for sha256 in inputs_of(run, called)]
    return found + [Leaf(CHECKPOINT, str(checkpoints.step_of(path)), manifest_sha256(path))
                    for path in checkpoints.complete(folder.checkpoints)]


def start_of(run: Path) -> str:
    """Return the hash of the manifest of the model that a run began from; empty: it began from its seed."""
    return next(iter(inputs_of(run, checkpoints.KIND)), "")


def inputs_of(run: Path, kind: str) -> dict[str, Path]:
    """Return what a run's records say that it learned from: hash of the manifest -> where it lay."""
    found: dict[str, Path] = {}
    for event in read_events(run / EVENTS):
        for given in event.get("inputs", ()) if event["event"] == "run_start" else ():
            if given["kind"] == kind:
                found.setdefault(str(given["manifest_sha256"]), Path(given["path"]))
    return found


def data_folders(run: Path) -> dict[str, Path]:
    """Return the run's data, [NAME=]folder as its settings have it -> where that lies.

    Raises:
        UserError: it is nowhere.
    """
    config = RunFolder(run).config()
    found = {}
    for given in config.data.paths if config is not None else ():
        place = Path(named_shards(given)[1])
        if not place.is_absolute():
            place = read_command(run).folder / place
        if not (place / MANIFEST).is_file():
            raise UserError(f"{run / CONFIG}: data.paths has {given}, and {place} holds no token shards; put "
                            "them back, or, in an audit, name where they lie by --data")
        found[given] = place
    return found


def documents_of(run: Path, known: Sequence[Leaf]) -> list[Leaf]:
    """Return the roots of the documents of a run's data; all tokens of those are read that are not known.

    Args:
        run: the run's folder.
        known: what was published before.

    Raises:
        UserError: its data are not where they were, or are damaged.
    """
    done = {leaf.name: leaf for leaf in known if leaf.kind == DOCUMENTS}
    places = {manifest_sha256(place): place for place in data_folders(run).values()}
    return [done.get(name) or Leaf(DOCUMENTS, name, documents_root(place)) for name, place in places.items()]


def publish(run: Path, log: Path, key: Path | None = None, *, documents: bool = False) -> tuple[Leaf, ...]:
    """Add to a log what a run has that the log has not, and sign it; returns what is new.

    Args:
        run: the run's folder.
        log: the log; it may not be there yet.
        key: a secret key of minisign without a password; None: nothing is signed.
        documents: also the roots by which documents are proved one by one.

    Raises:
        UserError: the log is damaged or of another run, a checkpoint is not what was published of it, or the
            key cannot be used.
    """
    before = read_commitment(log) if log.exists() else None
    known = before.leaves if before is not None else ()
    found = leaves_of(run)
    _refuse_others(log, run, before, found)
    found += documents_of(run, known) if documents else []
    new = tuple(leaf for leaf in found if leaf not in known)
    if new:
        lines = log.read_text(encoding="utf-8").rstrip("\n").split("\n") if before is not None else []
        entry = Entry(len(lines), hashlib.sha256(lines[-1].encode()).hexdigest() if lines else "",
                      run.resolve().name, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), new,
                      merkle_root([leaf.line() for leaf in (*known, *new)]))
        atomic_write(log, "\n".join([*lines, entry.line()]) + "\n")
    if key is not None:
        # also where nothing is new: a kill may have come between the log and its signature
        sign(log, key)
    return new


def _refuse_others(log: Path, run: Path, before: Commitment | None, found: Sequence[Leaf]) -> None:
    if before is None:
        return
    if before.entries[0].run != run.resolve().name:
        raise UserError(f"{log}: is of the run {before.entries[0].run!r}, and {run} is another; name a log "
                        "of its own")
    published = {leaf.name: leaf.sha256 for leaf in before.find(CHECKPOINT)}
    for leaf in found:
        if leaf.kind == CHECKPOINT and published.get(leaf.name, leaf.sha256) != leaf.sha256:
            raise UserError(f"{run}: step-{leaf.name} has manifest {leaf.sha256[:12]}, and {log} has "
                            f"published {published[leaf.name][:12]} of it; a checkpoint that was published "
                            "cannot change: begin a new run")


def read_commitment(log: Path) -> Commitment:
    """Return a log, whose chain of hashes and roots are checked.

    Raises:
        UserError: it cannot be read, or was changed in a line that others follow.
    """
    try:
        lines = log.read_text(encoding="utf-8").rstrip("\n").split("\n")
        entries = tuple(_entry(json.loads(line)) for line in lines)
        leaves: list[bytes] = []
        data = {leaf.sha256 for entry in entries for leaf in entry.leaves if leaf.kind == DATA}
        last = 0
        for number, entry in enumerate(entries):
            before = hashlib.sha256(lines[number - 1].encode()).hexdigest() if number else ""
            leaves += [leaf.line() for leaf in entry.leaves]
            # nobody would hash those of others again, whose proofs say that the run has read them
            for leaf in entry.leaves:
                if leaf.kind == DOCUMENTS and leaf.name not in data:
                    raise ValueError(f"line {number + 1} has documents of {leaf.name[:12]}, which is no data")
            for step in (int(leaf.name) for leaf in entry.leaves if leaf.kind == CHECKPOINT):
                if step <= last:
                    raise ValueError(f"line {number + 1} has step {step} behind step {last}")
                last = step
            if (entry.number, entry.previous, entry.root) != (number, before, merkle_root(leaves)):
                raise ValueError(f"line {number + 1} does not follow from those before it")
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as e:
        raise UserError(f"{log}: is no log of `megatron-sov audit commit` ({str(e)[:200]}); take it from "
                        "where it was published") from None
    return Commitment(log, entries)


def _entry(raw: Mapping[str, Any]) -> Entry:
    if raw["format"] != FORMAT:
        raise ValueError(f"format is {raw['format']!r}, must be {FORMAT}")
    return Entry(int(raw["number"]), str(raw["previous"]), str(raw["run"]), str(raw["written"]),
                 tuple(map(_leaf, raw["leaves"])), str(raw["root"]))


def _leaf(raw: Mapping[str, Any]) -> Leaf:
    leaf = Leaf(str(raw["kind"]), str(raw["name"]), str(raw["sha256"]))
    if leaf.kind not in KINDS or not HASH.fullmatch(leaf.sha256):
        raise ValueError(f"it has a leaf of kind {leaf.kind!r} with hash {leaf.sha256!r}")
    if leaf.kind == CHECKPOINT and not STEP.fullmatch(leaf.name):
        raise ValueError(f"it has a checkpoint of step {leaf.name!r}")
    if leaf.kind == DOCUMENTS and not HASH.fullmatch(leaf.name):
        raise ValueError(f"it has documents of {leaf.name!r}")
    return leaf


def _minisign() -> Any:
    try:
        import minisign
    except ImportError:
        raise UserError(f"a signature needs py-minisign: {how_to_install('audit')}") from None
    return minisign


def sign(file: Path, key: Path) -> None:
    """Write the signature of a file, in minisign's format, beside it.

    Raises:
        UserError: the key cannot be used.
    """
    atomic_write(file.with_name(file.name + SIGNATURE), _signature(file.read_bytes(), file.name, key))


def try_key(key: Path) -> None:
    """Sign nothing, before long work whose result a key is to sign.

    Raises:
        UserError: the key cannot be used.
    """
    _signature(b"", "", key)


def _signature(content: bytes, name: str, key: Path) -> bytes:
    minisign = _minisign()
    try:
        secret = minisign.SecretKey.from_file(key)
        return bytes(secret.sign(io.BytesIO(content), trusted_comment=f"file:{name}"))
    except (OSError, ValueError, minisign.Error) as e:
        raise UserError(f"--key {key}: cannot sign ({str(e)[:200] or type(e).__name__}); it must be a secret "
                        "key of minisign without a password (`minisign -G -W`)") from None


def check_signature(file: Path, key: Path) -> None:
    """Check a file against the signature that stands beside it.

    Raises:
        UserError: there is none, it is another's, or of another content.
    """
    minisign = _minisign()
    signature = file.with_name(file.name + SIGNATURE)
    try:
        public = minisign.PublicKey.from_file(key)
        with open(file, "rb") as data:
            public.verify(data, minisign.Signature.from_file(signature))
    except (OSError, ValueError, minisign.Error) as e:
        raise UserError(f"{signature}: does not sign {file} for --public-key {key} "
                        f"({str(e)[:200] or type(e).__name__}); take both from where they were "
                        "published") from None

