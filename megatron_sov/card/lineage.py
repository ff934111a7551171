"""From a run back to everything that it was made from, by the hashes that its events and manifests name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sov.artifacts import (
    MANIFEST,
    Manifest,
    inputs_of,
    is_artifact,
    manifest_sha256,
    places_of,
    read_manifest,
)
from megatron_sov.card.compute import flops_per_token
from megatron_sov.card.picture import Graph, Node
from megatron_sov.card.run_record import RunRecord, read_run_record
from megatron_sov.errors import UserError
from megatron_sov.obs.events import EVENTS
from megatron_sov.runs.checkpoints import BASE, CHECKPOINTS_OF_A_RUN, KIND, SOURCE, latest, short_name
from megatron_sov.runs.folder import COMPLETION, CONFIG, EXPORTS, ROUNDS

RUN, HF_MODEL, TOKENS, CORPUS = "run", "hf_model", "tokens", "corpus"
MAX_RUNS = 100
MAX_FILES = 2_000
"""Files of an artifact whose hashes stand in the graph one by one."""
COMMAND_LINE = "the command line"


@dataclass
class Lineage:
    """A model's history."""

    runs: list[RunRecord] = field(default_factory=list)
    """Its runs, the first one first."""
    graph: Graph = field(default_factory=Graph)
    """All of it."""
    places: dict[str, Path] = field(default_factory=dict)
    """Id of a node -> its folder, where that was found; never written into a card."""
    manifests: dict[str, Manifest] = field(default_factory=dict)
    """Id of an artifact -> its manifest."""
    model: str = ""
    """Id of the last run's checkpoint; empty: it has none."""
    exports: list[str] = field(default_factory=list)
    """Ids of Hugging Face folders of the last run's checkpoints."""
    unknown: list[str] = field(default_factory=list)
    """One sentence for each thing that could not be followed."""

    @property
    def data(self) -> list[Path]:
        """Folders of the token shards that the runs read."""
        read = {sha256 for run in self.runs for sha256 in run.inputs}
        return [self.places[i] for i, m in self.manifests.items() if m.kind == TOKENS and i in read]


def lineage(runs: Sequence[Path], elsewhere: Sequence[Path] = (), hf_folder: Path | None = None) -> Lineage:
    """Return what a run was made from.

    Args:
        runs: its folder, last; before it the runs that it continues, where its events do not name them.
        elsewhere: runs and artifacts that lie no longer where events and manifests say.
        hf_folder: an export of the run.

    Raises:
        UserError: a folder is none of these, is damaged, or belongs to another model.
    """
    walk = _Walk(elsewhere)
    for before, path in zip((None, *runs), runs, strict=False):
        walk.run(path)
        if before is not None:
            walk.joined_by_hand(before, path)
    found = walk.found
    last = walk.run(runs[-1])
    found.model = walk.model_of(last)
    exports = sorted(p.parent for p in (runs[-1] / EXPORTS).glob(f"*/{MANIFEST}"))
    for export in [*exports, *([hf_folder] if hf_folder is not None else [])]:
        walk.export(export, last, is_asked=export is hf_folder)
    walk.drain()
    order = [node.id for node in found.graph.order()]
    found.runs.sort(key=lambda run: order.index(run.id))
    return found


class _Walk:
    """Follows what events and manifests name; each thing once."""

    def __init__(self, elsewhere: Sequence[Path]) -> None:
        self.found = Lineage()
        self._runs: dict[Path, RunRecord] = {}
        self._waiting: list[str] = []
        self._elsewhere: dict[str, Path] = {}
        for path in elsewhere:
            for folder in [path, *sorted((path / CHECKPOINTS_OF_A_RUN).glob("step-*"))]:
                if (folder / MANIFEST).is_file():
                    self._elsewhere[manifest_sha256(folder)] = folder
            if not (path / MANIFEST).is_file() and not (path / CONFIG).is_file():
                raise UserError(f"--from {path}: is neither a run nor an artifact; pass a folder that one of "
                                "our commands wrote")

    def run(self, path: Path) -> RunRecord:
        """Follow a run."""
        place = path.resolve()
        if place in self._runs:
            return self._runs[place]
        if len(self._runs) >= MAX_RUNS:
            raise UserError(f"{path}: the model was made by more than {MAX_RUNS} runs; look at their events")
        names = {run.name for run in self._runs.values()}
        name = next(n for i in range(1, MAX_RUNS + 2)
                    if (n := place.name if i == 1 else f"{place.name} ({i})") not in names)
        record = self._runs[place] = read_run_record(path, name, flops_per_token)
        self.found.runs.append(record)
        self.found.places[record.id] = path
        files = record.files()
        self.found.graph.add(Node(record.id, RUN, name, files.get(CONFIG, ""), _described(record),
                                  content={"files": files}))
        for sha256, (item, key) in record.inputs.items():
            self._input(path, item["path"], sha256, item["kind"], record.id, f"{EVENTS}: {key}")
        self._rounds(record)
        return record

    def joined_by_hand(self, before: Path, path: Path) -> None:
        """Join two runs that the user named in order, unless the later one's events say where it started."""
        record, earlier = self.run(path), self.run(before)
        if any(item["kind"] == KIND for item, _ in record.inputs.values()):
            return
        model = self.model_of(earlier)
        self.found.graph.join(model or earlier.id, record.id, COMMAND_LINE)

    def model_of(self, record: RunRecord) -> str:
        """Add the checkpoint that a run left, and return its id; empty where it has none.

        Raises:
            UserError: it is not what the run has completed with.
        """
        done = record.completion or {}
        folder = (record.path / str(done["checkpoint"]) if isinstance(done.get("checkpoint"), str)
                  else latest(record.path / CHECKPOINTS_OF_A_RUN))
        sha256 = done.get("checkpoint_sha256")
        if folder is None:
            self._note(f"run {record.name!r} has no checkpoint")
            return ""
        if _is_below(folder, record.path) and (folder / MANIFEST).is_file():
            found = manifest_sha256(folder)
            if isinstance(sha256, str) and found != sha256:
                raise UserError(f"{folder}: is not the checkpoint that {record.path / COMPLETION} names "
                                f"(manifest {found[:12]}, there {sha256[:12]}); restore it, or run the stage "
                                "again")
            self._artifact(folder, found)
            self.found.graph.join(record.id, found, COMPLETION if isinstance(sha256, str) else MANIFEST)
            return found
        if not isinstance(sha256, str):
            self._note(f"the checkpoint of run {record.name!r} is not there, and nothing tells its hash")
            return ""
        self._missing(KIND, short_name(folder), sha256)
        self.found.graph.join(record.id, sha256, COMPLETION)
        return sha256

    def export(self, folder: Path, record: RunRecord, is_asked: bool) -> None:
        """Add a Hugging Face folder, if it was made from a checkpoint of a run."""
        manifest = read_manifest(folder)
        left = (record.path / CHECKPOINTS_OF_A_RUN).glob(f"step-*/{MANIFEST}")
        own = ({manifest_sha256(p.parent) for p in left} | {self.found.model}) - {""}
        inputs = [item["manifest_sha256"] for item in inputs_of(folder, manifest) if item["kind"] == KIND]
        if manifest.kind != HF_MODEL or not own & set(inputs):
            if is_asked:
                raise UserError(f"--hf-folder {folder}: was not made from a checkpoint of {record.path}; "
                                "export it with `megatron-sov convert to-hf`, or pass the run that it was "
                                "made from")
            return
        sha256 = manifest_sha256(folder)
        self._artifact(folder, sha256)
        if sha256 not in self.found.exports:
            self.found.exports.append(sha256)

    def _rounds(self, record: RunRecord) -> None:
        """Add the rounds of responses that a run trained on, as one thing."""
        files = sorted((record.path / ROUNDS).glob(f"[0-9]*/{MANIFEST}"))
        if not files:
            return
        hashes = {file.parent.name: manifest_sha256(file.parent) for file in files[:MAX_FILES]}
        whole = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()
        node = f"{ROUNDS} of {record.id}"
        self.found.graph.add(Node(node, ROUNDS, f"{ROUNDS} of {record.name}", whole,
                                  f"{len(files):,} rounds of responses", content={"manifests": hashes}))
        self.found.graph.join(node, record.id, f"{ROUNDS}/*/{MANIFEST}")

    def _input(self, by: Path, path: str, sha256: str, kind: str, target: str, told_by: str) -> None:
        """Follow one input to where it lies now, if it is what it was."""
        places = places_of(path, by)
        if kind == KIND:  # RUN/checkpoints/step-N beside this run's folder, where both were moved
            places.append(by.parent / Path(*Path(path).parts[-3:]))
        known = self.found.places.get(sha256) or self._elsewhere.get(sha256)
        folder = next((p for p in places if is_artifact(p, sha256)), known)
        if folder is not None:
            self._artifact(folder, sha256)
        else:
            self._missing(kind, short_name(Path(path)), sha256)
            self._run_that_left(places, sha256)
        self.found.graph.join(sha256, target, told_by)

    def _artifact(self, folder: Path, sha256: str) -> None:
        """Add an artifact that was found; what it was made from is followed by and by (`drain`)."""
        found = self.found
        if sha256 in found.places:
            return
        manifest = read_manifest(folder)
        files = {name: record.digest for name, record in list(manifest.files.items())[:MAX_FILES]}
        told = manifest.content.get(SOURCE)
        name = told if isinstance(told, str) else short_name(folder.resolve())
        found.graph.add(Node(sha256, manifest.kind, name, sha256,
                             f"{len(manifest.files):,} files", content={"files": files}))
        found.places[sha256], found.manifests[sha256] = folder, manifest
        if manifest.kind not in (TOKENS, CORPUS):  # which `sov-data card` follows
            self._waiting.append(sha256)

    def drain(self) -> None:
        """Follow what artifacts were made from until nothing is left."""
        while self._waiting:
            self._follow(self._waiting.pop())

    def _follow(self, sha256: str) -> None:
        folder, manifest = self.found.places[sha256], self.found.manifests[sha256]
        for item in inputs_of(folder, manifest):
            self._input(folder, item["path"], item["manifest_sha256"], item["kind"], sha256, MANIFEST)
        base = manifest.content.get(BASE)
        if isinstance(base, dict) and all(isinstance(base.get(key), str) for key in ("sha256", "path")):
            self._input(folder, base["path"], base["sha256"], KIND, sha256, f"{MANIFEST}: content.{BASE}")
        if manifest.kind == KIND:
            self._run_that_left([folder], sha256)

    def _run_that_left(self, places: Sequence[Path], sha256: str) -> None:
        """Follow the run in whose folder a checkpoint lies, or lay."""
        for place in places:
            run = place.parent.parent
            if place.parent.name == CHECKPOINTS_OF_A_RUN and (run / CONFIG).is_file():
                record = self.run(run)
                if not (place / MANIFEST).is_file() and (record.completion or {}).get(
                        "checkpoint_sha256") != sha256:
                    self._note(f"checkpoint {place.name!r} of run {record.name!r} is not there any more, so "
                               "that only its path says that this run left it")
                self.found.graph.join(record.id, sha256, "the folder that it lies in")
                return

    def _missing(self, kind: str, name: str, sha256: str) -> None:
        """Add something of which only name and hash are on record."""
        self.found.graph.add(Node(sha256, kind, name, sha256, is_proven=False))

    def _note(self, sentence: str) -> None:
        if sentence not in self.found.unknown:
            self.found.unknown.append(sentence)


def _is_below(folder: Path, root: Path) -> bool:
    """Return whether a folder, as a file names it, lies below another one."""
    try:
        return folder.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError):  # no path of this machine
        return False


def _described(record: RunRecord) -> str:
    """Return what a run did, in a few words."""
    done = record.completion or {}
    steps = done.get("step") or (record.attempts[-1].last_step if record.attempts else None)
    return f"{record.config.objective.name}, {steps or 0:,} steps"
