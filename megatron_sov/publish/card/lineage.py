"""From a run back to everything that it was made from, by the hashes that its events and manifests name."""

from __future__ import annotations

import hashlib
import html
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import (
    MANIFEST, Manifest, find_input, inputs_of, manifest_sha256, places_of, read_manifest)
from megatron_sov.base.errors import UserError, visible
from megatron_sov.publish.card.run_record import CardRunRecord, flops_per_token, read_run_record
from megatron_sov.runs.checkpoints import BASE, CHECKPOINTS_OF_A_RUN, KIND, SOURCE, latest, short_name
from megatron_sov.runs.folder import COMPLETION, CONFIG, EXPORTS, ROUNDS
from megatron_sov.runs.obs.events import EVENTS

# The provenance graph as an SVG: columns from raw files to exported tensors; it loads nothing.

# What a model was made from, as a graph: raw files, sources, steps, shards, runs, checkpoints, exports.

MAX_NODES = 5_000
"""Of one graph; a longer history is no honest one."""


@dataclass(frozen=True)
class Node:
    """One thing on the way from raw files to the model."""

    id: str
    """Unique: the hash of a manifest, or a name below one."""
    kind: str
    """raw, source, step, corpus, tokens, tokenizer, run, checkpoint, hf_model, ..."""
    name: str
    """Of its folder, source or step; where it lies is nobody's business."""
    sha256: str = ""
    """Hash of its manifest, of a run's settings, of the list of raw files' hashes; empty: none is known."""
    detail: str = ""
    """In a few words what it did."""
    is_proven: bool = True
    """Whether a file with that hash was seen; else only its name and hash are on record."""
    content: dict[str, Any] = field(default_factory=dict)
    """More of it: hashes of single files."""


@dataclass(frozen=True)
class Edge:
    """One thing that another one was made from."""

    source: str
    """Id of what was used."""
    target: str
    """Id of what was made."""
    told_by: str
    """What says so: a manifest, an event, or the command line."""


class Graph:
    """Nodes and edges, each once."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.edges: dict[tuple[str, str], Edge] = {}

    def add(self, node: Node) -> bool:
        """Add a node; returns whether it is new.  One that was seen takes the place of one that was not.

        Raises:
            UserError: there are more than any honest history has.
        """
        old = self.nodes.get(node.id)
        if old is None and len(self.nodes) >= MAX_NODES:
            raise UserError(f"{node.kind} {node.name!r}: the model was made from more than {MAX_NODES:,} "
                            "things; look at the manifests")
        if old is None or (node.is_proven and not old.is_proven):
            self.nodes[node.id] = node
        return old is None

    def join(self, source: str, target: str, told_by: str) -> None:
        self.edges.setdefault((source, target), Edge(source, target, told_by))

    def order(self) -> list[Node]:
        """Return the nodes, each behind what it was made from.

        Raises:
            UserError: something was made from itself.
        """
        sorter: TopologicalSorter[str] = TopologicalSorter({node: [] for node in self.nodes})
        for edge in self.edges.values():
            sorter.add(edge.target, edge.source)
        try:
            return [self.nodes[node] for node in sorter.static_order()]
        except CycleError as e:
            names = [self.nodes[node].name for node in e.args[1]]
            raise UserError(f"provenance: {' <- '.join(map(repr, names[:8]))} is made from itself, which no "
                            "true manifest says; look at these manifests") from None

    def ancestors(self, ids: Iterable[str]) -> set[str]:
        """Return the nodes that some were made from, themselves included."""
        made_from: dict[str, list[str]] = {}
        for edge in self.edges.values():
            made_from.setdefault(edge.target, []).append(edge.source)
        found: set[str] = set()
        waiting = list(ids)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += made_from.get(node, [])
        return found

    def as_json(self) -> dict[str, Any]:
        """Return the graph as plain values, causes before effects."""
        return {"nodes": [{"id": n.id, "kind": n.kind, "name": n.name, "sha256": n.sha256, "detail": n.detail,
                           "is_proven": n.is_proven, **({"content": n.content} if n.content else {})}
                          for n in self.order()],
                "edges": [{"from": e.source, "to": e.target, "told_by": e.told_by}
                          for e in self.edges.values()]}


WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 190, 46, 60, 14, 20
"""Of a box, between boxes, and around, in pixels."""
MAX_ROWS = 30
"""Boxes of a column; more are drawn as one that says how many, and all stand in provenance.json."""
MAX_CHARS = 26
COLOURS = {"raw": "#eceff1", "source": "#e3f2fd", "step": "#e8f5e9", "corpus": "#c8e6c9", "tokens": "#a5d6a7",
           "tokenizer": "#fff9c4", "run": "#ffe0b2", "rounds": "#ffecb3", "checkpoint": "#d1c4e9",
           "hf_model": "#f8bbd0"}


def picture(graph: Graph) -> str:
    """Return the drawing.

    Raises:
        UserError: something was made from itself.
    """
    columns, drawn = _columns(graph)
    places = {node.id: (MARGIN + x * (WIDTH + GAP_X), MARGIN + y * (HEIGHT + GAP_Y))
              for x, column in enumerate(columns) for y, node in enumerate(column)}
    rows = max((len(column) for column in columns), default=1)
    width = 2 * MARGIN + len(columns) * WIDTH + max(0, len(columns) - 1) * GAP_X
    height = 2 * MARGIN + rows * (HEIGHT + GAP_Y)
    arrows = {(drawn[e.source], drawn[e.target]) for e in graph.edges.values()}
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
             f'height="{height}" font-family="sans-serif" font-size="11">',
             '<title>What the model was made from</title>',
             f'<rect width="{width}" height="{height}" fill="#ffffff"/>']
    # before the boxes, which then cover the arrows' ends; sorted, so that equal graphs give equal bytes
    lines += [_arrow(places[source], places[target]) for source, target in sorted(arrows) if source != target]
    lines += [_box(node, *places[node.id]) for column in columns for node in column]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _columns(graph: Graph) -> tuple[list[list[Node]], dict[str, str]]:
    """Return boxes by columns, and id of a node -> id of the box that stands for it."""
    order = graph.order()
    made_from: dict[str, list[str]] = defaultdict(list)
    used_by: dict[str, list[str]] = defaultdict(list)
    for edge in graph.edges.values():
        made_from[edge.target].append(edge.source)
        used_by[edge.source].append(edge.target)
    depth: dict[str, int] = {}  # from the right: everything stands as near as it can to what is made from it
    for node in reversed(order):
        depth[node.id] = max((depth[target] + 1 for target in used_by[node.id]), default=0)
    by_rank: dict[int, list[Node]] = defaultdict(list)
    for node in order:
        by_rank[-depth[node.id]].append(node)
    columns: list[list[Node]] = []
    drawn: dict[str, str] = {}
    row: dict[str, int] = {}
    for number in sorted(by_rank):
        nodes = sorted(by_rank[number], key=lambda n: (
            _middle([row[source] for source in made_from[n.id] if source in row]), n.id))
        shown, rest = nodes[:MAX_ROWS], nodes[MAX_ROWS:]
        if rest:
            more = Node(f"more {number}", "", f"and {len(rest) + 1:,} more", detail="in provenance.json")
            # the last box gives its place to the one that says how many
            rest = [shown.pop(), *rest]
            shown.append(more)
            drawn |= dict.fromkeys((n.id for n in rest), more.id)
            row |= dict.fromkeys((n.id for n in rest), len(shown) - 1)
        drawn |= {n.id: n.id for n in shown}
        row |= {n.id: i for i, n in enumerate(shown)}
        columns.append(shown)
    return columns, drawn


def _middle(rows: list[int]) -> float:
    return sum(rows) / len(rows) if rows else 0.0


def _box(node: Node, x: int, y: int) -> str:
    style = "" if node.is_proven else ' stroke-dasharray="4 3"'
    words = [(15, "bold", node.name), (28, "normal", f"{node.kind} {node.sha256[:12]}".strip()),
             (40, "normal", node.detail)]
    text = "".join(f'<text x="{x + 8}" y="{y + down}" font-weight="{weight}">{_text(word)}</text>'
                   for down, weight, word in words if word)
    return (f'<g><title>{_text(f"{node.kind} {node.name} {node.sha256}", 400)}</title>'
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" stroke="#607d8b"{style} '
            f'fill="{COLOURS.get(node.kind, "#ffffff")}"/>{text}</g>')


def _arrow(source: tuple[int, int], target: tuple[int, int]) -> str:
    x0, y0 = source[0] + WIDTH, source[1] + HEIGHT // 2
    x1, y1 = target[0], target[1] + HEIGHT // 2
    bend = max(20, (x1 - x0) // 2)
    return (f'<path d="M{x0} {y0} C{x0 + bend} {y0} {x1 - bend} {y1} {x1} {y1}" fill="none" '
            'stroke="#90a4ae" stroke-width="1.2"/>')


def _text(text: str, chars: int = MAX_CHARS) -> str:
    """Return text as XML takes it, cut, on one line."""
    line = visible(" ".join(text.split()))
    # XML has no such characters, not even escaped: one in a name would make the file unreadable
    line = "".join(c if c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF and ord(c) not in (0xFFFE, 0xFFFF)
                   else "\N{REPLACEMENT CHARACTER}" for c in line)
    return html.escape(line if len(line) <= chars else f"{line[:chars - 1]}…")


RUN, HF_MODEL, TOKENS, CORPUS = "run", "hf_model", "tokens", "corpus"
MAX_RUNS = 100
MAX_FILES = 2_000
"""Files of an artifact whose hashes stand in the graph one by one."""
COMMAND_LINE = "the command line"


@dataclass
class Lineage:
    """A model's history."""

    runs: list[CardRunRecord] = field(default_factory=list)
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
    walk = _LineageWalk(elsewhere)
    # each run with the one before it, in the order of the command line
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
    # last: runs and exports have put their artifacts on the list
    walk.drain()
    # causes before effects, so the first run comes first whatever order they were found in
    order = [node.id for node in found.graph.order()]
    found.runs.sort(key=lambda run: order.index(run.id))
    return found


class _LineageWalk:
    """Follows what events and manifests name; each thing once."""

    def __init__(self, elsewhere: Sequence[Path]) -> None:
        self.found = Lineage()
        self._runs: dict[Path, CardRunRecord] = {}
        self._waiting: list[str] = []
        self._elsewhere: dict[str, Path] = {}
        for path in elsewhere:
            for folder in [path, *sorted((path / CHECKPOINTS_OF_A_RUN).glob("step-*"))]:
                if (folder / MANIFEST).is_file():
                    # by hash: a folder that was moved or renamed is known again
                    self._elsewhere[manifest_sha256(folder)] = folder
            if not (path / MANIFEST).is_file() and not (path / CONFIG).is_file():
                raise UserError(f"--from {path}: is neither a run nor an artifact; pass a folder that one of "
                                "our commands wrote")

    def run(self, path: Path) -> CardRunRecord:
        """Follow a run."""
        place = path.resolve()
        # by real path, so a link to a run does not make a second one
        if place in self._runs:
            return self._runs[place]
        # a bound, since events of strangers could name runs without end
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
        # what the events prove goes before what the command line says
        if any(item["kind"] == KIND for item, _ in record.inputs.values()):
            return
        model = self.model_of(earlier)
        self.found.graph.join(model or earlier.id, record.id, COMMAND_LINE)

    def model_of(self, record: CardRunRecord) -> str:
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
        # complete.json is a file like others: its path must not lead out of the run
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

    def export(self, folder: Path, record: CardRunRecord, is_asked: bool) -> None:
        """Add a Hugging Face folder, if it was made from a checkpoint of a run."""
        manifest = read_manifest(folder)
        left = (record.path / CHECKPOINTS_OF_A_RUN).glob(f"step-*/{MANIFEST}")
        # the completed checkpoint may be gone, and its hash is still known
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

    def _rounds(self, record: CardRunRecord) -> None:
        """Add the rounds of responses that a run trained on, as one thing."""
        files = sorted((record.path / ROUNDS).glob(f"[0-9]*/{MANIFEST}"))
        if not files:
            return
        hashes = {file.parent.name: manifest_sha256(file.parent) for file in files[:MAX_FILES]}
        # one hash for all rounds, whose own hashes stand in the node
        whole = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()
        node = f"{ROUNDS} of {record.id}"
        self.found.graph.add(Node(node, ROUNDS, f"{ROUNDS} of {record.name}", whole,
                                  f"{len(files):,} rounds of responses", content={"manifests": hashes}))
        self.found.graph.join(node, record.id, f"{ROUNDS}/*/{MANIFEST}")

    def _input(self, by: Path, path: str, sha256: str, kind: str, target: str, told_by: str) -> None:
        """Follow one input to where it lies now, if it is what it was."""
        folder = find_input(path, sha256, by, self._elsewhere | self.found.places)
        # found by hash; a folder of that name with other content is another thing
        if folder is not None:
            self._artifact(folder, sha256)
        else:
            self._missing(kind, short_name(Path(path)), sha256)
            self._run_that_left(places_of(path, by), sha256)
        self.found.graph.join(sha256, target, told_by)

    def _artifact(self, folder: Path, sha256: str) -> None:
        """Add an artifact that was found; what it was made from is followed by and by (`drain`)."""
        found = self.found
        # many runs share data and tokenizer
        if sha256 in found.places:
            return
        manifest = read_manifest(folder)
        files = {name: record.digest for name, record in list(manifest.files.items())[:MAX_FILES]}
        told = manifest.content.get(SOURCE)
        name = told if isinstance(told, str) else short_name(folder.resolve())
        found.graph.add(Node(sha256, manifest.kind, name, sha256,
                             f"{len(manifest.files):,} files", content={"files": files}))
        found.places[sha256], found.manifests[sha256] = folder, manifest
        # a list instead of recursion: chains of checkpoints may be long
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


def _described(record: CardRunRecord) -> str:
    done = record.completion or {}
    steps = done.get("step") or (record.attempts[-1].last_step if record.attempts else None)
    return f"{record.config.objective.name}, {steps or 0:,} steps"
