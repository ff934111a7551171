"""Writes docs/pictures/house.svg: the rooms of the code on their floors, from the table that the tests hold
imports to (tests/test_architecture.py): `python docs/generate_house.py`."""

from __future__ import annotations

import ast
import importlib.util
import sys
from html import escape
from pathlib import Path
from types import ModuleType

from megatron_sov.base.artifacts import atomic_write

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/pictures/house.svg"
SAYS = {
    "errors": "one sentence, an exit code", "version": "what is distributed",
    "command_line": "how commands are read", "plugins": "users' own code", "config": "every setting",
    "outputs": "where results may lie",
    "digests": "hashes of contents", "pretrained": "models of others, loaded",
    "work": "processes, locks, progress",
    "artifacts": "folders with manifests",
    "compiled": "loops as machine code", "byte_bpe": "a tokenizer's rules", "documents": "text and records",
    "chat": "templates, messages, masks", "endpoints": "models over HTTP",
    "rewards": "verifiers, judges",
    "obs": "run events, trackers",
    "pages": "HTML that loads nothing", "models": "families, weight maps", "objectives": "objectives by name",
    "recipes": "published configurations", "plan": "memory, speed, money", "runs": "a run on disk",
    "clusters": "profiles, GPUs", "tools": "environments, episodes", "rollouts": "the store of RL",
    "data": "the order of samples", "mcore": "the only door to Megatron-Core", "train": "one loop",
    "convert": "Hugging Face folders", "generate": "text from a model", "eval": "needles, loss, pass@k",
    "serving": "an OpenAI-compatible address",
    "extend": "longer contexts, gates", "post": "SFT, distillation, RL", "report": "the report of a run",
    "slurm": "jobs on a cluster", "doctor": "what a machine has",
    "bundle": "a cluster without a network", "commands": "one file for each command",
    "cli": "the door: megatron-sov", "__main__": "python -m megatron_sov", "api": "the door from Python",
    "__init__": "import megatron_sov", "tokenizer": "sov-tokenizer", "data_prep": "sov-data",
    "card": "model cards from manifests", "ladder": "families of small models",
    "kubernetes": "stages as TrainJobs",
}
"""Room -> a few words; of a room that is not here, its docstring's first sentence stands."""
FLOORS = ("Foundation", "Ground floor",
          *(f"{nth} floor" for nth in ("First", "Second", "Third", "Fourth", "Fifth", "Sixth", "Seventh")))
WIDTH, LEFT, BOX, HEIGHT, GAP, COLUMNS = 1240, 150, 204, 58, 10, 5
COLOURS = ("#e8e2d6", "#dfe9dc", "#dce8ee", "#e2e0f0", "#f0e2ea", "#f3e6d8", "#eeeeee", "#e6e6e6")


def rules() -> ModuleType:
    """Return the tests that hold the rules, for their tables."""
    spec = importlib.util.spec_from_file_location("house_rules", ROOT / "tests/test_architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def named_sets(table: ModuleType) -> list[tuple[str, set[str]]]:
    """Return the sets of rooms that the table is written with, from the smallest to the largest."""
    return [("the foundation", table.BASE), ("the ground floor", table.GROUND),
            ("data and mcore", table.FIRST), ("train, convert, generate", table.SECOND),
            ("eval", table.THIRD)]


def floors(table: ModuleType) -> dict[str, int]:
    """Return each room's floor: a named set shares one, others stand above what they may import."""
    sets = [rooms for _, rooms in named_sets(table)]
    found = {room: next(i for i, rooms in enumerate(sets) if room in rooms) for room in sets[-1]}

    def floor(room: str) -> int:
        if room not in found:
            found[room] = 1 + max((floor(below) for below in table.MAY_IMPORT[room]), default=-1)
        return found[room]

    for room in table.MAY_IMPORT:
        floor(room)
    return found


def may_import(table: ModuleType, room: str) -> str:
    """Return what a room may import, in words: the largest named set that it has, and what is beside."""
    allowed = table.MAY_IMPORT[room]
    whole = [(name, rooms) for name, rooms in named_sets(table) if rooms <= allowed]
    name, rooms = whole[-1] if whole else ("", set())
    beside = sorted(allowed - rooms)
    words = [f"all up to {name}"] * bool(name) + beside
    return ", ".join(words) or "nothing"


def words_of(room: str) -> str:
    """Return what stands in a room's box."""
    if room in SAYS:
        return SAYS[room]
    path = ROOT / "megatron_sov" / room
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    about = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return about.partition("\n")[0][:30]


def box(table: ModuleType, room: str, x: int, y: int, colour: str) -> str:
    """Return one room: its name, what it is, and what it may import."""
    allowed = may_import(table, room)
    shown = allowed if len(allowed) <= 36 else f"{allowed[:35]}…"
    edge = ' stroke-width="3"' if room == "mcore" else ""
    return (f'<g><title>{escape(f"{room} may import: {allowed}")}</title>'
            f'<rect x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="4" fill="{colour}" '
            f'stroke="#555"{edge}/>'
            f'<text x="{x + 8}" y="{y + 19}" class="room">{escape(room)}</text>'
            f'<text x="{x + 8}" y="{y + 36}" class="says">{escape(words_of(room))}</text>'
            f'<text x="{x + 8}" y="{y + 50}" class="may">↓ {escape(shown)}</text></g>\n')


def wings(table: ModuleType, y: int) -> str:
    """Return the wings inside large rooms, each line from the ground up."""
    lines = []
    for i, (folder, found) in enumerate(table.WINGS.items()):
        told = "  <  ".join(", ".join(sorted(wing or "its own files" for wing in floor)) for floor in found)
        text = escape(f"{folder}:  {told}")
        lines.append(f'<text x="{LEFT}" y="{y + 22 * i}" class="says">{text}</text>\n')
    return f'<text x="16" y="{y}" class="floor">Wings</text>\n' + "".join(lines)


def page() -> str:
    """Return the whole picture."""
    table = rules()
    where = floors(table)
    top, parts, y = max(where.values()), [], 100
    middle = LEFT + (WIDTH - LEFT - 20) // 2
    roof = (f'<path d="M {LEFT - 20} 86 L {middle} 14 L {WIDTH} 86 Z" fill="#b5654a"/>\n'
            f'<text x="{middle}" y="70" class="roof">megatron-sov: imports point downwards only</text>\n')
    for level in range(top, -1, -1):
        rooms = [room for room in table.MAY_IMPORT if where[room] == level]
        num_rows = -(-len(rooms) // COLUMNS)
        height = num_rows * (HEIGHT + GAP) + GAP
        parts.append(f'<rect x="{LEFT - GAP}" y="{y}" width="{WIDTH - LEFT}" height="{height}" fill="none" '
                     f'stroke="#999"/>\n<text x="16" y="{y + 26}" class="floor">{FLOORS[level]}</text>\n')
        for i, room in enumerate(rooms):
            x = LEFT + (i % COLUMNS) * (BOX + GAP)
            parts.append(box(table, room, x, y + GAP + (i // COLUMNS) * (HEIGHT + GAP),
                             COLOURS[min(level, len(COLOURS) - 1)]))
        y += height
    style = ("text{font-family:system-ui,sans-serif;fill:#222}.room{font-size:15px;font-weight:600}"
             ".says{font-size:12px}.may{font-size:10px;fill:#666}.floor{font-size:13px;font-weight:600}"
             ".roof{font-size:16px;font-weight:600;fill:#fff;text-anchor:middle}")
    end = y + 40 + 22 * len(table.WINGS)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 10} {end}" role="img" '
            'aria-label="The rooms of megatron-sov on their floors; a room imports from below only">\n'
            f'<style>{style}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n{roof}'
            + "".join(parts) + wings(table, y + 34) + "</svg>\n")


if __name__ == "__main__":
    atomic_write(PICTURE, page())
