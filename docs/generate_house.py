"""Write docs/pictures/house.svg: halls, ordered like `HALLS` in tests/test_architecture.py, with imports.

    python docs/generate_house.py              write the picture
    python docs/generate_house.py --counts     print the numbers of imports, lines and files with one user
"""

import importlib.util
import sys
from collections import Counter
from html import escape
from pathlib import Path
from types import ModuleType

from megatron_sov.base.artifacts import write_atomically

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/pictures/house.svg"
SUBJECTS = {
    "base": "errors, artifacts, settings, plug-ins, documents",
    "chat": "chat templates, tool calls, special tokens",
    "work": "processes, locks, progress, arrays",
    "sandbox": "runs model-written programs, reads untrusted files",
    "model": "settings of a run, families, recipes",
    "schedules": "phase, batch size and learning rate of every step",
    "runs": "a run on disk: folder, lock, checkpoints, events",
    "judge": "rewards and tool worlds",
    "rollouts": "the store of prompts, responses and rewards",
    "plan": "memory, speed and cost of a run",
    "engine": "the only importer of Megatron-Core",
    "checkpoint": "writes and reads checkpoints at any layout",
    "convert": "Hugging Face, PEFT and Megatron folders",
    "train": "the order of data, one loop for every objective",
    "infer": "text from a model",
    "eval": "loss, needles, pass@k",
    "post": "SFT, distillation, preferences, RL, longer contexts",
    "omni": "images and audio: files, tokens, networks, evaluation",
    "bench": "lm-eval tasks, suites, contamination",
    "proof": "compares a layout with one process",
    "serve": "an OpenAI-compatible API",
    "operate": "Slurm, the doctor",
    "publish": "reports",
    "commands": "declarations (NAME.py) and work (NAME_run.py)",
    "tokenizer": "sov-tokenizer", "data_prep": "sov-data",
}
"""Hall or other program -> subject."""
LEFT, TOP, CELL, ROW = 470, 120, 34, 30


def build_page() -> str:
    """Draw an SVG with a row per hall and a dot in each imported hall's column."""
    rules, halls = load_rules(), list(SUBJECTS)
    num_imports = count_imports(rules)
    width, height = LEFT + CELL * len(halls) + 20, TOP + ROW * len(halls) + 20
    parts = []
    for column, hall in enumerate(halls[:-2]):
        x = LEFT + column * CELL + CELL // 2
        parts.append(f'<text class="name" transform="translate({x + 5} {TOP - 8}) rotate(-55)">{hall}'
                     "</text>\n")
    for row, hall in enumerate(halls):
        y = TOP + row * ROW
        shade = "#dfe9dc" if hall in rules.LEAVES else "#dce8ee" if hall in halls[-2:] else "#f0ece2"
        parts.append(f'<rect x="8" y="{y + 2}" width="{width - 16}" height="{ROW - 4}" rx="4" '
                     f'fill="{shade}"/>\n'
                     f'<text class="name" x="18" y="{y + 20}">{hall}</text>\n'
                     f'<text class="subject" x="112" y="{y + 20}">{escape(SUBJECTS[hall])}</text>\n')
        parts += [f'<circle cx="{LEFT + column * CELL + CELL // 2}" cy="{y + ROW // 2}" r="6" fill="#b5654a">'
                  f"<title>{hall} imports {imported}</title></circle>\n"
                  for column, imported in enumerate(halls) if num_imports[hall, imported]]
    style = ("text{font-family:system-ui,sans-serif;fill:#222}.name{font-size:14px;font-weight:600}"
             ".subject{font-size:12px}")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            'aria-label="The halls of megatron-sov in their order; a hall imports only those above it">\n'
            f'<style>{style}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n' + "".join(parts)
            + "</svg>\n")


def format_counts() -> str:
    """Format import counts between halls, source lines, and the number of files with a single importer."""
    rules, halls = load_rules(), list(SUBJECTS)
    num_imports = count_imports(rules)
    lines = [" " * 10 + "".join(f"{hall[:8]:>9}" for hall in halls[:-2])]
    lines += [f"{hall:<10}" + "".join(f"{num_imports[hall, imported] or '.':>9}" for imported in halls[:-2])
              for hall in halls]
    num_upwards = sum(number for (hall, imported), number in num_imports.items()
                  if halls.index(imported) > halls.index(hall))
    lines += [f"{len(num_imports)} arrows, {num_upwards} upwards", ""]
    sources = rules.sources(ROOT)
    single_user = {module for module, users in rules.users_of(sources).items() if len(users) == 1}
    num_with_packages = sum(len(users) == 1 for users in rules.users_of(sources, packages_too=True).values())
    return "\n".join([
        *lines, f"{'all':<10}{rules.count_lines(sources):>9,} lines", "",
        f"{len(single_user)} files with a single importer; tables name "
        f"{len(single_user & rules.named_in_tables(sources))} of these",
        f"{num_with_packages} if `from package import module` also counts as an import of the package"])


def load_rules() -> ModuleType:
    """Import tests/test_architecture.py by its path."""
    spec = importlib.util.spec_from_file_location("house_rules", ROOT / "tests/test_architecture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def count_imports(rules: ModuleType) -> Counter[tuple[str, str]]:
    """Count imports in `rules.sources` by (importing hall, imported hall)."""
    counter: Counter[tuple[str, str]] = Counter()
    for source in rules.sources(ROOT):
        for _, name in source.imports():
            if name.startswith("megatron_sov.") and source.hall in SUBJECTS:
                hall = name.split(".")[1]
                if hall in SUBJECTS and hall != source.hall:
                    counter[source.hall, hall] += 1
    return counter


if __name__ == "__main__":
    if sys.argv[1:] == ["--counts"]:
        print(format_counts())
    else:
        write_atomically(PICTURE, build_page())
