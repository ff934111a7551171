"""Writes docs/pictures/house.svg: the halls of the code in their order, and which imports which, from the
list that the tests hold imports to (tests/test_architecture.py).

    python docs/generate_house.py              the picture
    python docs/generate_house.py --counts     how many imports, lines and files of one user there are
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from html import escape
from pathlib import Path
from types import ModuleType

from megatron_sov.base.artifacts import write_atomically

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/pictures/house.svg"
SAYS = {
    "base": "errors, artifacts, settings, plug-ins, documents",
    "chat": "chat templates, tool calls, what token ids mean",
    "work": "processes, locks, progress, arrays",
    "sandbox": "processes that run a model's programs, or read files of others",
    "model": "settings of a run, families, recipes",
    "schedules": "phase, batch size and learning rate of every step",
    "runs": "a run on disk: folder, lock, checkpoints, events",
    "judge": "rewards and tool worlds",
    "rollouts": "the store of prompts, responses and rewards",
    "plan": "memory, speed and money of a run",
    "engine": "the only door to Megatron-Core",
    "checkpoint": "written and read at any layout",
    "convert": "Hugging Face, PEFT and Megatron folders",
    "train": "the order of data, one loop for every objective",
    "infer": "text from a model",
    "eval": "loss, needles, pass@k",
    "post": "SFT, distillation, preferences, RL, longer contexts",
    "omni": "pictures and sounds: files, tokens, networks, judging",
    "bench": "the harness's tasks, suites, contamination",
    "proof": "a layout beside one process",
    "serve": "an OpenAI-compatible address",
    "operate": "Slurm, bundles, the doctor",
    "publish": "reports",
    "commands": "one file for each command",
    "tokenizer": "sov-tokenizer", "data_prep": "sov-data",
}
"""Hall, or package beside them -> a few words."""
LEFT, TOP, CELL, ROW = 470, 120, 34, 30


def rules() -> ModuleType:
    """Return the tests that hold the rules, for their list."""
    spec = importlib.util.spec_from_file_location("house_rules", ROOT / "tests/test_architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def arrows(table: ModuleType) -> Counter[tuple[str, str]]:
    """Return (hall, hall that it imports) -> number of imports, of the rules' `table`."""
    return Counter((source.hall, name.split(".")[1]) for source in table.sources(ROOT)
                   for _, name in source.imports()
                   if name.startswith("megatron_sov.") and source.hall in SAYS
                   and name.split(".")[1] in set(SAYS) - {source.hall})


def page() -> str:
    """Return the whole picture: a row for each hall, a mark under each one that it imports."""
    table, halls = rules(), list(SAYS)
    found = arrows(table)
    width, height = LEFT + CELL * len(halls) + 20, TOP + ROW * len(halls) + 20
    parts = []
    for column, hall in enumerate(halls[:-2]):
        x = LEFT + column * CELL + CELL // 2
        parts.append(f'<text class="name" transform="translate({x + 5} {TOP - 8}) rotate(-55)">{hall}'
                     "</text>\n")
    for row, hall in enumerate(halls):
        y = TOP + row * ROW
        shade = "#dfe9dc" if hall in table.LEAVES else "#dce8ee" if hall in halls[-2:] else "#f0ece2"
        parts.append(f'<rect x="8" y="{y + 2}" width="{width - 16}" height="{ROW - 4}" rx="4" '
                     f'fill="{shade}"/>\n'
                     f'<text class="name" x="18" y="{y + 20}">{hall}</text>\n'
                     f'<text class="says" x="112" y="{y + 20}">{escape(SAYS[hall])}</text>\n')
        parts += [f'<circle cx="{LEFT + column * CELL + CELL // 2}" cy="{y + ROW // 2}" r="6" fill="#b5654a">'
                  f"<title>{hall} imports {other}</title></circle>\n"
                  for column, other in enumerate(halls) if found[hall, other]]
    style = ("text{font-family:system-ui,sans-serif;fill:#222}.name{font-size:14px;font-weight:600}"
             ".says{font-size:12px}")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            'aria-label="The halls of megatron-sov in their order; a hall imports only those above it">\n'
            f'<style>{style}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n' + "".join(parts)
            + "</svg>\n")


def counts() -> str:
    """Return the table of imports, who imports whom how often, and the lines of all sources."""
    table, halls = rules(), list(SAYS)
    found = arrows(table)
    lines = [" " * 10 + "".join(f"{hall[:8]:>9}" for hall in halls[:-2])]
    lines += [f"{hall:<10}" + "".join(f"{found[hall, other] or '.':>9}" for other in halls[:-2])
              for hall in halls]
    upwards = sum(number for (hall, other), number in found.items() if halls.index(other) > halls.index(hall))
    lines += [f"{len(found)} arrows, {upwards} of them upwards", ""]
    sources = table.sources(ROOT)
    one = {module for module, users in table.users_of(sources).items() if len(users) == 1}
    with_packages = sum(len(users) == 1 for users in table.users_of(sources, packages_too=True).values())
    return "\n".join([
        *lines, f"{'all':<10}{table.count_lines(sources):>9,} lines", "",
        f"{len(one)} files that one other file imports, of which a table names "
        f"{len(one & table.named_in_tables(sources))} too",
        f"{with_packages} where `from package import module` counts as an import of the package as well"])


if __name__ == "__main__":
    if sys.argv[1:] == ["--counts"]:
        print(counts())
    else:
        write_atomically(PICTURE, page())
