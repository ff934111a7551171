"""What came before a run's first step, again: the tokenizer is learned from its texts, the token shards are
packed from theirs, and a teacher is asked of them, by the ordinary commands with the settings that their
manifests have.

Manifests are the lab's.  What of their settings a command cannot be told shows as a difference between its
manifest and theirs, so that nothing that was left out passes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sov.audit.commitment import DOCUMENTS, STATES_KIND, Leaf
from megatron_sov.audit.documents import documents_root
from megatron_sov.audit.repeating import LOG, RepeatOutcome, folder_problem, run_logged
from megatron_sov.base.artifacts import (
    MANIFEST, Manifest, atomic_write, manifest_sha256, read_manifest, to_json)
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.sealed import read_json, write_json

TOKENS, TOKENIZER = "tokens", "tokenizer"
AGAIN, RULES = "again", "rules.json"
FACTS = {TOKENS: ("inputs", "encoder"), TOKENIZER: ("groups", "stages"), STATES_KIND: ("teacher_path",)}
"""What a manifest has among its settings, and was found while they were followed."""
TOLD = {TOKENS: (), TOKENIZER: ("bytes_per_token", "checked"), STATES_KIND: ()}
"""Of its content what names the places of texts."""


@dataclass(frozen=True)
class RemadeArtifact:
    """What came of one artifact that was made again."""

    kind: str
    """tokens, tokenizer, documents or teacher_states."""
    sha256: str
    """Of its published manifest; of documents that of their line in the log."""
    outcome: RepeatOutcome
    """equal, different or unproved."""
    detail: str
    tokenizer: str = ""
    """Of token shards: the hash of its tokenizer's manifest."""

    @property
    def passed(self) -> bool:
        return self.outcome == RepeatOutcome.EQUAL

    def sentence(self) -> str:
        """Return what was found."""
        return f"{self.kind} {self.sha256[:12]}: {self.outcome}{f', {self.detail}' if self.detail else ''}"


class _Unproved(Exception):
    """What is missing, or cannot be told to a command."""


@dataclass(frozen=True)
class Moved:
    """Where the auditor has what the lab's manifests name."""

    places: Mapping[str, Path]
    """Path of the lab's, or of a folder above it -> the auditor's."""

    def find(self, given: str) -> Path:
        """Return where a path of the lab's lies here."""
        for folder in (Path(given), *Path(given).parents):
            if str(folder) in self.places:
                return self.places[str(folder)] / Path(given).relative_to(folder)
        return Path(given)


def parse_moved(arguments: Sequence[str]) -> Moved:
    """Read OLD=NEW arguments.

    Raises:
        UserError: one has no =, or its new place is not there.
    """
    places = {}
    for argument in arguments:
        old, equals, new = argument.rpartition("=")
        if not equals or not old or not Path(new).exists():
            raise UserError(f"--moved {argument}: must be OLD=NEW, a path of the lab's manifests and where "
                            "that lies here")
        places[str(Path(old))] = Path(new).absolute()
    return Moved(places)


def prepare_again(shards: Path, moved: Moved, work: Path) -> list[RemadeArtifact]:
    """Make token shards and their tokenizer again, and compare each with what was published.

    Args:
        shards: folder of token shards, whose manifest the caller has held to the log.
        moved: where texts and tokenizer lie here.
        work: folder of the audit; what is done there is not done again.

    Raises:
        UserError: the audit's folder cannot be written, or holds what was changed.
    """
    try:
        place = _tokenizer_of(read_manifest(shards, TOKENS), moved)
    except _Unproved as e:
        return [_keep(work, RemadeArtifact(TOKENS, manifest_sha256(shards), RepeatOutcome.UNPROVED, str(e)))]
    learned = _again(place, TOKENIZER, work, lambda found, folder: _learning(found, moved, folder / RULES))
    packed = _again(shards, TOKENS, work, lambda found, folder: _packing(found, place, moved),
                    manifest_sha256(place))
    return [learned, packed]


def ask_again(states: Path, teachers: Sequence[Path], data: Sequence[Path], work: Path) -> RemadeArtifact:
    """Have a teacher say again what it said of a run's data, and compare.

    Args:
        states: what it said, which the caller has held to the log.
        teachers: checkpoints or Hugging Face folders; the one whose weights the states name is asked.
        data: token shards, which the caller has held to the log.
        work: folder of the audit; what is done there is not done again.

    Raises:
        UserError: the audit's folder cannot be written, or holds what was changed; a teacher is no model.
    """
    return _again(states, STATES_KIND, work, lambda found, folder: _asking(found, teachers, data))


def hash_again(shards: Path, leaf: Leaf, work: Path) -> RemadeArtifact:
    """Hash the documents of token shards again, and compare their root with what was published.

    Args:
        shards: folder of token shards, which the caller has held to the log.
        leaf: what was published of their documents.
        work: folder of the audit; what is done there is not done again.

    Raises:
        UserError: the audit's folder cannot be written, or holds what was changed.
    """
    key = leaf.line_sha256()
    if (done := kept(work, DOCUMENTS, key)) is not None and done.outcome != RepeatOutcome.UNPROVED:
        return done
    if problem := folder_problem(shards):
        return _keep(work, RemadeArtifact(DOCUMENTS, key, RepeatOutcome.UNPROVED, problem))
    is_equal = documents_root(shards) == leaf.sha256
    return _keep(work, RemadeArtifact(
        DOCUMENTS, key, RepeatOutcome.EQUAL if is_equal else RepeatOutcome.DIFFERENT,
        "" if is_equal else f"the documents of data {leaf.name[:12]} have another root"))


def _asking(manifest: Manifest, teachers: Sequence[Path], data: Sequence[Path]) -> list[str]:
    """Return the command that asks the same teacher in the same way."""
    from megatron_sov.infer.engines.target import find_target
    from megatron_sov.post.distillation.teacher import weights_digest

    settings, kept = manifest.settings, manifest.content
    targets = {weights_digest(target): target for target in map(find_target, teachers)}
    if (target := targets.get(settings["teacher"])) is None:
        raise _Unproved(f"no --teacher has the weights {settings['teacher']}; ask the lab for that one")
    if not target.is_hf and (problem := folder_problem(target.path)):
        raise _Unproved(problem)
    places = {manifest_sha256(place): place for place in data}
    read = [places[given["manifest_sha256"]] for given in manifest.inputs if given["kind"] == TOKENS]
    flags = [*(f"--data={place.absolute()}" for place in read), f"--dtype={kept['dtype']}",
             f"--top-k={kept['top_k']}", f"--temperature={kept['temperature']}",
             *(f"--set={setting}" for setting in settings["settings"])]
    return ["megatron_sov", "distill", "states", str(target.path.absolute()), *flags,
            *(["--other-tokenizer"] if kept["translated"] else []),
            *([f"--nproc={settings['processes']}"] if settings["processes"] > 1 else [])]


def _tokenizer_of(manifest: Manifest, moved: Moved) -> Path:
    given = next((i for i in manifest.inputs if i["kind"] == TOKENIZER), None)
    if given is None:
        raise _Unproved("its manifest names no tokenizer")
    place = moved.find(given["path"])
    if not (place / MANIFEST).is_file() or manifest_sha256(place) != given["manifest_sha256"]:
        raise _Unproved(f"the tokenizer of manifest {given['manifest_sha256'][:12]} is not at {place}; ask "
                        "the lab for it, and say by --moved where it lies")
    return place


def _again(published: Path, kind: str, work: Path, spell: Callable[[Manifest, Path], list[str]],
           tokenizer: str = "") -> RemadeArtifact:
    """Make one artifact again, unless that was done, and compare.

    Args:
        published: the artifact.
        kind: its kind.
        work: folder of the audit.
        spell: takes its manifest and the folder in which it is made, and returns the command.
        tokenizer: hash of its manifest.
    """
    sha256 = manifest_sha256(published)
    if (done := kept(work, kind, sha256)) is not None and done.outcome != RepeatOutcome.UNPROVED:
        return done
    folder = work / f"{kind}-{sha256[:12]}"
    try:
        if problem := folder_problem(published):
            raise _Unproved(problem)
        manifest = read_manifest(published, kind)
        folder.mkdir(parents=True, exist_ok=True)
        words = [*spell(manifest, folder), f"--output={folder / AGAIN}", "--overwrite"]
        code, said = run_logged(words, folder / LOG)
        if code != ExitCode.OK:
            raise _Unproved(f"`{words[0].partition('.')[0]} {words[1]}` ends with exit code {code}: {said}")
        outcome, detail = _compare(manifest, read_manifest(folder / AGAIN, kind))
        shutil.rmtree(folder / AGAIN)
    except (_Unproved, KeyError, TypeError, AttributeError) as e:
        outcome = RepeatOutcome.UNPROVED
        detail = str(e) if isinstance(e, _Unproved) else f"its manifest has not a command's settings ({e!r})"
    return _keep(work, RemadeArtifact(kind, sha256, outcome, detail, tokenizer))


def _packing(manifest: Manifest, tokenizer: Path, moved: Moved) -> list[str]:
    """Return the command that packs the same texts."""
    settings, reading = manifest.settings, manifest.settings["reading"]
    if settings["steps"]:
        raise _Unproved("its documents went through code of the lab's own (--step)")
    flags = [("heldout", settings["heldout_share"]), ("format", reading["kind"]),
             ("text-field", reading["text_field"]), ("max-document-bytes", reading["max_document_bytes"]),
             ("bos", settings["bos"]), ("eod", settings["eod"]), ("on-bad", settings["on_bad"]),
             ("shard-tokens", settings["shard_tokens"]), *(("column", name) for name in reading["columns"]),
             *(("tag", key) for key in reading["tags"])]
    for tag in settings["tags"]:
        flags.append(("tag", f"{tag['source']}:" * bool(tag["source"]) + f"{tag['key']}={tag['value']}"))
    if reading["bucket_by"]:
        flags.append(("bucket-by", reading["bucket_by"]))
    if reading["renames"]:
        flags.append(("columns", ",".join(f"{new}={old}" for new, old in reading["renames"])))
    inputs = [f"--input={given['name']}={_text(given['path'], moved)}" for given in settings["inputs"]]
    return ["data_prep.cli", "pack", f"--tokenizer={tokenizer}",
            *(f"--{flag}={value}" for flag, value in flags), *(["--lines"] if reading["by_line"] else []),
            *inputs]


def _learning(manifest: Manifest, moved: Moved, rules: Path) -> list[str]:
    """Return the command that learns the same tokenizer, whose rules are written into a file."""
    settings = manifest.settings
    atomic_write(rules, to_json(settings["preset"]))
    flags = [("preset", "custom"), ("config", rules), ("vocab-size", settings["vocab_size"]),
             ("superword-sample-mb", settings["superword_sample_bytes"] / 1e6)]
    if not settings["only_superwords"]:
        flags.append(("transition-size", settings["transition_size"]))
    if settings["max_memory_bytes"] is not None:
        flags.append(("max-memory-gb", settings["max_memory_bytes"] / 1e9))
    inputs = []
    for group in settings["groups"]:
        # one without a name is called after its path, which may be another here
        name = "" if group["group"] in group["paths"] else f"{group['group']}="
        weight = "" if group["weight"] is None else f":{group['weight']}"
        inputs += [f"--input={name}{_text(path, moved)}{weight}" for path in group["paths"]]
    return ["tokenizer.cli", "train", *(f"--{flag}={value}" for flag, value in flags), *inputs]


def _text(given: str, moved: Moved) -> Path:
    place = moved.find(given)
    if not place.exists():
        raise _Unproved(f"the text {place} is not there; ask the lab for it, and say by --moved where it "
                        "lies")
    return place


def _compare(published: Manifest, again: Manifest) -> tuple[RepeatOutcome, str]:
    """Return whether both are the same in all but names of places."""
    kind = published.kind
    if settings := _differing(*(_without(m.settings, FACTS[kind]) for m in (published, again))):
        return RepeatOutcome.UNPROVED, f"a command cannot be told its settings {', '.join(settings)}"
    files = _differing(published.files, again.files)
    content = _differing(*(_without(m.content, TOLD[kind]) for m in (published, again)))
    learned = [_learned(m) for m in (published, again)] if kind == TOKENIZER else []
    if others := [*files, *content, *(_differing(*learned) if learned else [])]:
        return RepeatOutcome.DIFFERENT, f"these texts give other {', '.join(others[:4])}"
    return RepeatOutcome.EQUAL, ""


def _learned(manifest: Manifest) -> dict[str, Any]:
    """Return what a tokenizer was learned from, without the places."""
    groups = sorted(to_json(_without(group, ("group", "paths"))) for group in manifest.settings["groups"])
    return {"groups": groups, "stages": manifest.settings["stages"]}


def _without(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]


def _keep(work: Path, prepared: RemadeArtifact) -> RemadeArtifact:
    work.mkdir(parents=True, exist_ok=True)
    write_json(_file(work, prepared.kind, prepared.sha256), asdict(prepared), prepared.sha256)
    return prepared


def kept(work: Path, kind: str, sha256: str) -> RemadeArtifact | None:
    """Return what came of an artifact; None: it was not made again yet.

    Raises:
        UserError: the file was changed since.
    """
    file = _file(work, kind, sha256)
    if not file.is_file():
        return None
    raw: dict[str, Any] = read_json(file, "name another --work", sha256)
    return RemadeArtifact(**{**raw, "outcome": RepeatOutcome(raw["outcome"])})


def _file(work: Path, kind: str, sha256: str) -> Path:
    return work / f"{kind}-{sha256[:12]}.json"
