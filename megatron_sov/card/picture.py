"""The provenance graph as an SVG: columns from raw files to exported tensors; it loads nothing."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from megatron_sov.documents.visible import visible
from megatron_sov.errors import UserError

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
        """Add an edge between two nodes."""
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
    line = "".join(c if c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF and ord(c) not in (0xFFFE, 0xFFFF)
                   else "\N{REPLACEMENT CHARACTER}" for c in line)
    return html.escape(line if len(line) <= chars else f"{line[:chars - 1]}…")
