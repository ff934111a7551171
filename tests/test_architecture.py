"""Architecture rules, checked on the syntax trees of all sources: import order, forbidden calls, sizes.

A hall is a module or package directly in `megatron_sov`; a wing is a folder in a hall.

Each rule is proven on a bad tree as well, so that a rule that sees nothing cannot pass for a
rule that is kept.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from megatron_sov.version import OUR_PACKAGES

ROOT = Path(__file__).parents[1]
DATA_ONLY = {"slurm"}
"""Packages at the top that the code reads and nobody imports."""

HALLS = ("version", "base", "chat", "work", "sandbox", "model", "schedules", "runs", "judge", "rollouts",
         "plan", "engine", "checkpoint", "convert", "train", "infer", "eval", "post", "omni", "bench",
         "proof", "serve", "operate", "publish", "commands", "api", "cli", "__main__", "__init__")
"""Modules and packages of `megatron_sov` in import order: each imports only earlier ones."""
LEAVES = {"omni", "bench", "proof", "serve", "operate", "publish"}
"""Halls that only commands import: they build on the core, and not on each other."""
PROGRAMS = {"tokenizer": "judge", "data_prep": "judge"}
"""Top-level packages -> the last hall that they may import."""
LIBRARY, ITS_USERS = "layout_proof", {"engine", "proof"}
"""Top-level package without imports of halls, and the halls that may import it."""
CODECS_IN = ("data_prep", "omni")
"""Packages that may also import the hall `omni`: media are encoded as tokens when data are packed."""
LIGHT = {"publish": "plan", "operate": "engine", "api": "runs", "cli": "base"}
"""Hall -> the last hall that it may import (commands excepted), where this is stricter than its position."""
WITHOUT_PLAN = {"engine", "checkpoint", "convert", "train", "infer", "eval", "post"}
"""Halls that run models: a run does not price itself, its command does."""
MOST_AT_THE_TOP = 12
"""Largest number of files and folders directly in a hall."""

WINGS: dict[str, tuple[set[str], ...]] = {
    "megatron_sov/judge": ({"rewards"}, {"tools"}),
    "megatron_sov/model": ({"config"}, {"families"}, {"recipes", "counterparts"}),
    "megatron_sov/omni": ({"media"}, {"codecs"}, {"generation"}, {""}),
    "megatron_sov/engine": ({"parallel"}, {"model"}, {"optimizer", "decode"}),
    "megatron_sov/train": ({"data"}, {"objectives"}, {"guards", "side_jobs"}, {""}, {"stages"}),
    # steps know the contract of a pipeline, and a pipeline knows steps by name alone
    "data_prep/curate": ({"sources"}, {"pipeline"}, {"quality", "dedup", "scoring"}, {"decontamination"}),
    "tokenizer": ({"bpe"}, {"formats"}, {"report"}, {"compare"}),
}
"""Folder -> its wings (sub-folders) by floor, lowest first: a wing imports only wings on lower floors. ""
stands for the files in the folder itself; without "" these files are unrestricted."""

TORCH_FREE = {"version", "base", "chat", "work", "sandbox", "model", "schedules", "runs", "judge", "rollouts",
              "omni", "plan", "operate", "publish", "commands", "cli", "api", "__init__", "tokenizer",
              "data_prep"}
NETWORKS = ("megatron_sov/omni/codecs/", "megatron_sov/omni/generation/")
"""Folders in TORCH_FREE halls that may import torch at module level, because they run networks."""
HEAVY = {"torch", "transformers", "megatron", "vllm", "transformer_engine"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
MAY_UNPICKLE = {"megatron_sov/engine/parallel/launcher.py", "megatron_sov/work/submit/array_job.py",
                "megatron_sov/work/submit/arrays.py", "megatron_sov/convert/megatron/inert_pickle.py"}
"""Files that unpickle only what this project pickled; `inert_pickle` reads pickles without running them."""
STARTS = {"Popen", "Process", "Pool", "ProcessPoolExecutor", "fork", "flock", "get_context", "prctl"}
_INSIDE = "runs inside of the sandbox"
MAY_START = {"megatron_sov/engine/parallel/launcher.py": "ranks",
             "megatron_sov/base/artifacts.py": "holds temporary folders",
             "megatron_sov/judge/rewards/check_program.py": _INSIDE,
             "megatron_sov/judge/rewards/solution_tests.py": _INSIDE}
"""File outside of work that starts processes or holds locks -> why."""
MAY_RENAME = {"megatron_sov/checkpoint/host_snapshot.py": "of a folder that has no name yet",
              "megatron_sov/runs/checkpoints.py": "sets checkpoints aside",
              "megatron_sov/sandbox/folders.py": "flattens what it deletes",
              "megatron_sov/commands/evaluate/eval_passk_run.py": "into an artifact that is made"}
"""File outside of work that gives results their names by `os.rename` or `os.replace` -> why."""
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}
SAID = re.compile(r"__doc__|str\((e|error)\)|\{e\}|std(out|err)|\b(said|shown|why)\b")
"""Expressions that hold messages or program output, which `splitlines` may split."""
_PROGRAM, _SYSTEM, _PUBLISHED = "a program's output", "a file of the kernel", "as the published rule cuts it"
CUT_ANYWHERE = {
    "megatron_sov/operate/slurm/attempts.py": _PROGRAM,
    "megatron_sov/work/clusters/client.py": _PROGRAM, "megatron_sov/work/processes/background.py": _PROGRAM,
    "megatron_sov/work/endpoints/local_server.py": _PROGRAM,
    "megatron_sov/sandbox/enclosures.py": _SYSTEM, "megatron_sov/train/recorder.py": _SYSTEM,
    "megatron_sov/sandbox/system_calls.py": _SYSTEM,
    "data_prep/curate/quality/rules/step.py": _PUBLISHED}
"""File whose text may be split at any line separator -> kind of text."""
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 60
MAX_SOURCE_LINES = 127_680
"""Of megatron_sov, data_prep, tokenizer and layout_proof; this number only falls."""
MIN_LINES_OF_ONE_USER = 150
ALONE = {
    "megatron_sov/plan/budget.py": "tokens within a budget; the plan of one recipe is another subject",
    "megatron_sov/work/endpoints/http_client.py": "imports openai, which its user must not import at the top",
    "megatron_sov/base/pages/markdown.py": "text of strangers in Markdown; exports are another subject",
    "megatron_sov/commands/rl/teacher_models.py": "finds teachers; imports torch",
    "megatron_sov/checkpoint/gather.py": "megatron's side of exporting a live model",
    "megatron_sov/judge/rewards/check_program.py": _INSIDE,
    "megatron_sov/judge/tools/worlds/virtual_program.py": _INSIDE,
    "data_prep/synth/readers/queries.py": "queries with constraints; other readers are another subject",
    "data_prep/synth/functions/registry.py": "names of functions; compiling a file is another subject",
    "megatron_sov/convert/encoder_weights.py": "encoders of other models; whole models are another subject",
    "megatron_sov/train/guards/watchdog.py": "a thread that watches for steps that hang",
    "megatron_sov/train/recovery.py": "rejects steps and restores weights; the loop is another subject",
    "megatron_sov/proof/random_documents.py": "data of objectives; proving a layout is another subject",
    "megatron_sov/operate/contract.py": "parses sources of libraries; a machine is another subject",
}
"""Short file that is not merged into the only module that imports it -> reason."""


@dataclass(frozen=True)
class Source:
    """One source file under a root."""

    root: Path
    path: Path

    @cached_property
    def name(self) -> str:
        return self.path.relative_to(self.root).as_posix()

    @property
    def hall(self) -> str:
        """The hall of megatron_sov (`api.py` is the hall `api`), or the top-level package."""
        parts = self.path.relative_to(self.root).with_suffix("").parts
        return parts[1] if parts[0] == "megatron_sov" and len(parts) > 1 else parts[0]

    @property
    def tree(self) -> ast.Module:
        return self._parsed.tree

    @property
    def nodes(self) -> list[ast.AST]:
        """Every node of the tree."""
        return self._parsed.nodes

    @property
    def calls(self) -> list[tuple[ast.Call, str]]:
        """Every call, as (node, dotted name as written)."""
        return self._parsed.calls

    @property
    def _parsed(self) -> _Parsed:
        return _parse(self.path.read_text(encoding="utf-8"))

    def imports(self, top_level_only: bool = False) -> list[tuple[int, str]]:
        """Return (line, dotted name) of every import; `from a import b` gives a.b,
        since b may be a module."""
        return self._imports_at_load if top_level_only else self._all_imports

    @cached_property
    def constants(self) -> set[str]:
        """Every text in the file, as far as its first colon."""
        return {node.value.partition(":")[0] for node in self.nodes
                if isinstance(node, ast.Constant) and isinstance(node.value, str)}

    @cached_property
    def _all_imports(self) -> list[tuple[int, str]]:
        return list(self._read_imports(False))

    @cached_property
    def _imports_at_load(self) -> list[tuple[int, str]]:
        return list(self._read_imports(True))

    def _read_imports(self, top_level_only: bool) -> Iterator[tuple[int, str]]:
        for node in _top_level(self.tree) if top_level_only else _statements(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                package = list(self.path.relative_to(self.root).parts[:-1])
                base = package[:len(package) - node.level + 1] if node.level else []
                base += node.module.split(".") if node.module else []
                yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


class _Parsed:
    """Facts of one file that all rules use, collected once."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def calls(self) -> list[tuple[ast.Call, str]]:
        return [(node, ast.unparse(node.func)) for node in self.nodes if isinstance(node, ast.Call)]


@lru_cache(maxsize=1)
def _parse(text: str) -> _Parsed:
    """Parse a file and keep only the last result: all trees together take 240 MB."""
    return _Parsed(ast.parse(text))


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every statement, nested ones included, but no expressions."""
    for name in ("body", "orelse", "handlers", "finalbody", "cases"):
        for node in getattr(tree, name, None) or ():
            yield node
            yield from _statements(node)


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield statements that run on import: everything outside functions and outside `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _top_level(node)


def sources(root: Path) -> list[Source]:
    """Return all sources of the halls, and scripts at the top such as demo.py."""
    inside = [p for package in OUR_PACKAGES for p in (root / package).rglob("*.py")]
    return [Source(root, p) for p in sorted([*inside, *root.glob("*.py")])]


def may_import(hall: str) -> set[str]:
    """Return the halls that a hall, or a package next to them, may import."""
    if hall == LIBRARY:
        return set()
    last = PROGRAMS.get(hall) or LIGHT.get(hall)
    below = set(HALLS[:HALLS.index(last) + 1] if last else HALLS[:HALLS.index(hall)])
    if hall == CODECS_IN[0]:
        return below | {CODECS_IN[1]}
    if hall == "cli":
        return below | {"runs", "commands"}
    if hall == "__main__":
        return {"cli"}
    if hall in WITHOUT_PLAN:
        below -= {"plan"}
    return below if hall == "commands" else below - LEAVES


def import_problems(source: Source) -> Iterator[str]:
    """Imports lead to earlier halls only; one hall imports megatron; light halls import nothing heavy."""
    here = source.hall
    known = here in HALLS or here in {*PROGRAMS, LIBRARY}
    forbidden = set(HALLS) - {here} - may_import(here) if known else set()
    for line, name in source.imports():
        parts = name.split(".")
        where = f"{source.name}:{line}: imports {name}"
        if parts[0] == "megatron_sov" and set(parts[1:2]) & forbidden:
            yield f"{where}: hall '{here}' may not import '{parts[1]}'"
        if known and parts[0] in set(PROGRAMS) - {here}:
            yield f"{where}: halls meet '{parts[0]}' in artifacts only"
        if known and parts[0] == LIBRARY and here not in {LIBRARY, *ITS_USERS}:
            yield f"{where}: only {' and '.join(sorted(ITS_USERS))} import {LIBRARY}"
        if parts[0] == "megatron" and here not in ("engine", LIBRARY):
            yield f"{where}: only megatron_sov/engine imports megatron"
        if parts[:2] in (["megatron", "training"], ["megatron", "legacy"]):
            yield f"{where}: only megatron.core is used"
        if parts[0] == "apex":
            yield f"{where}: apex is not used"
        if parts[0] in PICKLES and source.name not in MAY_UNPICKLE:
            yield f"{where}: foreign files are not unpickled"
    free = here in TORCH_FREE and not source.name.startswith(NETWORKS) and source.path.stem[-4:] != "_run"
    if free or source.path.stem == "command" or source.path.stem.endswith("_command"):
        for line, name in source.imports(top_level_only=True):
            if name.split(".")[0] in HEAVY:
                yield (f"{source.name}:{line}: imports {name} at module level; "
                       "import it inside the function that needs it")


def wing_problems(source: Source) -> Iterator[str]:
    """Packages inside a hall also have an import order."""
    for folder, floors in WINGS.items():
        level = {wing: i for i, wings in enumerate(floors) for wing in wings}
        here = _wing(source.path, source.root / folder, level)
        if here not in level:
            continue
        for line, name in source.imports():
            target = source.root.joinpath(*name.split("."))
            there = _wing(target, source.root / folder, level)
            if there in level and there != here and level[there] >= level[here]:
                yield (f"{source.name}:{line}: imports {name}: wing '{here}' of {folder} may not "
                       f"import '{there}'")


def _wing(path: Path, folder: Path, wings: Collection[str]) -> str | None:
    """Return the sub-folder of `folder` that contains a module, ""
    for a file directly in it, None outside."""
    if not path.is_relative_to(folder) or path == folder:
        return None
    first = path.relative_to(folder).parts[0]
    return first if first in wings or (folder / first).is_dir() else ""


def circles(found: list[Source]) -> list[str]:
    """Return modules on an import cycle, or []; imports inside functions and for types count too."""
    modules = {source.name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): source
               for source in found}
    arrows: dict[str, set[str]] = {}
    for name, source in modules.items():
        imported = [target for _, target in source.imports()]
        targets = {*imported, *(target.rpartition(".")[0] for target in imported)} & modules.keys()
        arrows[name] = {target for target in targets - {name} if modules[target].path.name != "__init__.py"}
    try:
        list(TopologicalSorter(arrows).static_order())
    except CycleError as e:
        return list(map(str, e.args[1]))
    return []


def hall_problems(source: Source) -> Iterator[str]:
    """Every hall is in the list, so that a new hall is placed deliberately, and exports few names."""
    path = source.path.relative_to(source.root)
    if path.parts[0] == "megatron_sov" and source.hall not in HALLS:
        yield f"{source.name}: hall '{source.hall}' has no place; add it to HALLS"
    if path.name == "__init__.py" and len(path.parts) == (3 if path.parts[0] == "megatron_sov" else 2):
        shown = {p.stem for p in source.path.parent.iterdir()
                 if p.suffix == ".py" or (p / "__init__.py").exists()} - {"__init__"}
        if len(shown) > MOST_AT_THE_TOP:
            yield f"{source.name}: shows {len(shown)} files and folders, at most {MOST_AT_THE_TOP}"


def loading_problems(source: Source) -> Iterator[str]:
    """Loaders must not unpickle foreign files."""
    for node, called in source.calls:
        keywords = {k.arg: k.value for k in node.keywords}
        if called == "torch.load" and ast.unparse(keywords.get("weights_only", ast.Constant(None))) != "True":
            yield f"{source.name}:{node.lineno}: torch.load needs weights_only=True"
        if "allow_pickle" in keywords and ast.unparse(keywords["allow_pickle"]) != "False":
            yield f"{source.name}:{node.lineno}: allow_pickle must stay False"


def model_problems(source: Source) -> Iterator[str]:
    """Only one module may load models with a library: it rejects weights
    that the library would initialize at random."""
    for node in source.nodes:
        if (source.name != "megatron_sov/model/pretrained.py" and isinstance(node, ast.Attribute)
                and node.attr == "from_pretrained" and "Tokenizer" not in ast.unparse(node.value)):
            yield (f"{source.name}:{node.lineno}: {ast.unparse(node)} makes up weights that are missing; use "
                   "megatron_sov.model.pretrained.load_pretrained")


def line_problems(source: Source) -> Iterator[str]:
    """Lines of data end with a newline only: `str.splitlines` also splits at U+2028, form feeds and record
    separators, which texts contain. Messages and program output may be split that way."""
    for node in source.nodes:
        if (isinstance(node, ast.Attribute) and node.attr == "splitlines" and source.name not in CUT_ANYWHERE
                and not SAID.search(ast.unparse(node.value))):
            yield f'{source.name}:{node.lineno}: splitlines cuts data at more than newlines; use split("\\n")'


def size_problems(source: Source) -> Iterator[str]:
    """Files and functions are short, and file names describe their content."""
    num_lines = len(source.path.read_text(encoding="utf-8").splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"{source.name}: has {num_lines} lines, at most {MAX_FILE_LINES}"
    if set(source.path.relative_to(source.root).with_suffix("").parts) & VAGUE_NAMES:
        yield f"{source.name}: is named after nothing; name it after what it holds"
    for node in source.nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield (f"{source.name}:{node.lineno}: {node.name} has {length} lines, "
                       f"at most {MAX_FUNCTION_LINES}")


def work_problems(source: Source) -> Iterator[str]:
    """Only the hall `work`, the sandbox and the rank launcher start processes and hold locks."""
    if source.name.startswith(("megatron_sov/work/", "megatron_sov/sandbox/")) or source.name in MAY_START:
        return
    named: list[tuple[ast.expr, str]] = [(node, node.id) for node in source.nodes
                                         if isinstance(node, ast.Name) and "PR_SET_PDEATHSIG" in node.id]
    started = [(node, called) for node, called in source.calls
               if called.rpartition(".")[2] in STARTS and not called.startswith("psutil.")]
    for node, used in (*started, *named):
        yield (f"{source.name}:{node.lineno}: {used}: processes and locks are megatron_sov.work's; use what "
               "it has")


def rename_problems(source: Source) -> Iterator[str]:
    """Only one module renames results into place, after their bytes are on disk."""
    if source.name.startswith("megatron_sov/work/") or source.name in {**MAY_RENAME, **MAY_START}:
        return
    for node, called in source.calls:
        if called in ("os.rename", "os.replace"):
            yield (f"{source.name}:{node.lineno}: {called}: use new_file, new_folder or "
                   "delete_folder of megatron_sov.base.artifacts")


def data_problems(source: Source) -> Iterator[str]:
    """Packages in DATA_ONLY contain no code, except a docstring in `__init__.py`."""
    package = source.path.relative_to(source.root).parts[0]
    is_only_docstring = (source.path.name == "__init__.py" and ast.get_docstring(source.tree)
                            and len(source.tree.body) == 1)
    if package in DATA_ONLY and not is_only_docstring:
        yield f"{source.name}: {package} holds data alone; its code belongs into megatron_sov/{package}"


def map_modules(found: list[Source]) -> dict[str, Source]:
    """Return dotted name -> source."""
    return {source.name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): source
            for source in found}


def find_users(found: list[Source], packages_too: bool = False) -> dict[str, set[str]]:
    """Return module -> modules that import it; with `packages_too` also package -> modules that import one of
    its modules from it."""
    modules, users = map_modules(found), dict[str, set[str]]()
    for name, source in modules.items():
        for _, imported in source.imports():
            package = imported.rpartition(".")[0]
            for module in {imported, package} if packages_too or imported not in modules else {imported}:
                if module in modules and module != name:
                    users.setdefault(module, set()).add(name)
    return users


def named_in_tables(found: list[Source]) -> set[str]:
    """Return the modules named in commands.json or in a string of another file, such as a table of steps."""
    modules = map_modules(found)
    root = found[0].root
    commands = [row for file in [*root.glob("*/commands.json"), *root.glob("*/commands/commands.json")]
                for row in json.loads(file.read_text(encoding="utf-8")).values()]
    return {row["module"].partition(":")[0] for row in commands} | {
        module for name, source in modules.items() for module in source.constants & modules.keys()
        if module != name}


def lonely(found: list[Source]) -> list[str]:
    """Return short files with a single importer and no entry in a table of
    commands or steps: they belong in their user."""
    modules, users = map_modules(found), find_users(found)
    short = {name for name, source in modules.items() if source.path.name != "__init__.py"
             and len(source.path.read_text(encoding="utf-8").splitlines()) < MIN_LINES_OF_ONE_USER}
    return sorted(modules[name].name for name in short & users.keys() - named_in_tables(found)
                  if len(users[name]) == 1)


def count_lines(found: list[Source]) -> int:
    """Return the lines of all sources; scripts at the top are in no wheel."""
    return sum(len(source.path.read_text(encoding="utf-8").split("\n")) - 1 for source in found
               if source.path.parent != source.root)


RULES = (import_problems, wing_problems, hall_problems, loading_problems, model_problems, line_problems,
         size_problems, work_problems, rename_problems, data_problems)


@pytest.fixture(scope="module")
def house() -> list[Source]:
    """All sources."""
    return sources(ROOT)


@pytest.fixture(scope="module")
def problems(house: list[Source]) -> dict[str, list[str]]:
    """Rule -> its problems; all rules check a file before the next file, so that each file is parsed once."""
    found: dict[str, list[str]] = {rule.__name__: [] for rule in RULES}
    for source in house:
        for rule in RULES:
            found[rule.__name__] += rule(source)
        assert source.constants is not None  # read while the file is parsed, for the tests below
    return found


@pytest.mark.each("rule", [rule.__name__ for rule in RULES])
def test_the_house_keeps_its_rules(rule: str, house: list[Source], problems: dict[str, list[str]]) -> None:
    assert {"base", "model", "engine", "tokenizer", "data_prep"} <= {s.hall for s in house}
    assert problems[rule] == []


def test_no_files_import_each_other_in_a_circle(tmp_path: Path, house: list[Source]) -> None:
    assert circles(house) == []
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/a.py").write_text("from tokenizer import b")
    (tmp_path / "tokenizer/b.py").write_text("def f():\n    from tokenizer.a import x")
    assert sorted(set(circles(sources(tmp_path)))) == ["tokenizer.a", "tokenizer.b"]


def test_short_files_have_more_than_one_user(tmp_path: Path, house: list[Source]) -> None:
    assert sorted(lonely(house)) == sorted(ALONE)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/a.py").write_text("from tokenizer import b\nfrom tokenizer.c import x\n"
                                             + "\n" * 150)
    (tmp_path / "tokenizer/b.py").write_text("")
    (tmp_path / "tokenizer/c.py").write_text("x = 1\n" * 150)
    assert lonely(sources(tmp_path)) == ["tokenizer/b.py"]


def test_the_source_only_shrinks(house: list[Source]) -> None:
    assert 100_000 < count_lines(house) <= MAX_SOURCE_LINES


BAD = [
    ("megatron_sov/base/artifacts.py", "from megatron_sov.model.config import RunConfig",
     "hall 'base' may not import 'model'"),
    ("megatron_sov/engine/model/specs.py", "from megatron_sov.convert import proof",
     "hall 'engine' may not import 'convert'"),
    ("megatron_sov/train/loop.py", "def f():\n    from megatron_sov.bench.lm import run",
     "hall 'train' may not import 'bench'"),
    ("megatron_sov/train/data/order.py", "def f():\n    from megatron_sov.train.guards import watchdog",
     "wing 'data' of megatron_sov/train may not import 'guards'"),
    ("megatron_sov/convert/peft.py", "from ..train import loop", "hall 'convert' may not import 'train'"),
    ("megatron_sov/train/loop.py", "from megatron_sov.plan import pricing",
     "hall 'train' may not import 'plan'"),
    ("megatron_sov/train/loop.py", "def f():\n    from megatron_sov.train.stages import stage",
     "wing '' of megatron_sov/train may not import 'stages'"),
    ("tokenizer/train.py", "def f():\n    from megatron_sov.plan import pricing",
     "hall 'tokenizer' may not import 'plan'"),
    ("data_prep/shards/pack.py", "def f():\n    import tokenizer.train",
     "halls meet 'tokenizer' in artifacts only"),
    ("data_prep/shards/pack.py", "def f():\n    import megatron.core",
     "only megatron_sov/engine imports megatron"),
    ("layout_proof/cpu_shims.py", "def f():\n    from megatron_sov.base import errors",
     "hall 'layout_proof' may not import 'base'"),
    ("megatron_sov/train/loop.py", "import layout_proof.cpu_shims",
     "only engine and proof import layout_proof"),
    ("megatron_sov/engine/model/specs.py", "from megatron.training import get_args",
     "only megatron.core is used"),
    ("megatron_sov/engine/model/specs.py", "import apex", "apex is not used"),
    ("megatron_sov/publish/report/page.py", "def f():\n    from megatron_sov.engine import router",
     "hall 'publish' may not import 'engine'"),
    ("megatron_sov/train/data/order.py", "import pickle", "not unpickled"),
    ("megatron_sov/model/recipes/sources.py", "try:\n    import torch\nexcept ImportError:\n    torch = None",
     "at module level"),
    ("megatron_sov/commands/train/kinds.py", "from transformers import AutoTokenizer", "at module level"),
    ("megatron_sov/train/loop.py", "x = torch.load(f)", "weights_only=True"),
    ("megatron_sov/train/data/order.py", "x = np.load(f, allow_pickle=True)", "allow_pickle"),
    ("megatron_sov/bench/lm/engine_runs.py", "m = AutoModelForCausalLM.from_pretrained(f)",
     "makes up weights"),
    ("megatron_sov/train/data/order.py", "x = text.splitlines()", "cuts data at more than newlines"),
    ("megatron_sov/train/data/utils.py", "", "named after nothing"),
    ("megatron_sov/cellar/wine.py", "", "has no place"),
    ("megatron_sov/operate/slurm/stages.py", "from megatron_sov.commands import eval",
     "hall 'operate' may not import 'commands'"),
    ("slurm/__init__.py", "import megatron_sov.version", "slurm holds data alone"),
    ("slurm/chains.py", "", "slurm holds data alone"),
    ("megatron_sov/train/data/order.py", "x = 1\n" * 601, "has 601 lines"),
    ("megatron_sov/train/data/order.py", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
]


@pytest.mark.each(("name", "text", "expected"), BAD)
def test_each_rule_sees_its_breach(tmp_path: Path, name: str, text: str, expected: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    problems = [problem for source in sources(tmp_path) for rule in RULES for problem in rule(source)]
    assert len(problems) == 1
    assert expected in problems[0]
    assert problems[0].startswith(name)
