"""The rules of the house, read from the syntax trees of all sources: who may import whom,
and how large things may be.

Each rule is proven on a bad tree as well, so that a rule that sees nothing cannot pass for a
rule that is kept.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from megatron_sov.version import OUR_PACKAGES

ROOT = Path(__file__).parents[1]
DATA_ONLY = {"slurm"}
"""Packages at the top that the code reads and nobody imports."""

BASE = {"errors", "version", "command_line", "plugins", "settings", "config", "outputs",
        "digests", "artifacts", "compiled", "pretrained", "sealed", "work", "clusters",
        "byte_bpe", "documents", "media", "codecs", "chat", "endpoints", "rewards", "obs", "pages"}
GROUND = BASE | {"models", "counterparts", "objectives", "recipes", "plan", "runs", "tools", "rollouts"}
FIRST = GROUND | {"data", "mcore"}
SECOND = FIRST | {"train", "convert", "generate"}
THIRD = SECOND | {"eval"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(), "version": set(), "command_line": {"errors", "version", "documents"},
    "plugins": {"errors", "version", "settings"}, "settings": {"errors"},
    "config": {"errors", "plugins", "settings"}, "outputs": {"errors"},
    "digests": set(), "compiled": set(), "artifacts": {"errors", "version", "outputs", "digests"},
    "work": {"errors", "version", "outputs", "artifacts", "documents", "obs", "sealed", "settings",
             "clusters"},
    "pretrained": {"errors"},
    # what reads pictures and sounds is enclosed as what runs programs is
    "media": {"errors", "artifacts", "outputs", "documents", "compiled", "work", "settings"},
    # networks: whoever needs them opens them where they are needed; pickles are bounded as templates are
    "codecs": {"errors", "settings", "config", "artifacts", "digests", "outputs", "documents",
               "media", "obs", "pages", "chat", "pretrained", "work"},
    "sealed": {"errors", "artifacts", "digests"},
    "byte_bpe": set(), "documents": {"errors", "compiled", "sealed"}, "endpoints": {"errors", "settings"},
    "chat": {"errors", "documents"}, "rewards": BASE, "tools": BASE, "rollouts": BASE, "obs": BASE,
    "pages": {"version", "documents"},
    "models": BASE, "counterparts": BASE | {"models"}, "objectives": BASE,
    "recipes": BASE | {"models", "objectives"}, "plan": GROUND,
    "runs": BASE, "clusters": {"errors", "settings", "obs"}, "data": GROUND, "mcore": GROUND,
    # both accept a Hugging Face folder
    "convert": FIRST, "train": FIRST | {"convert"}, "generate": FIRST | {"convert"},
    "eval": SECOND, "serving": SECOND,
    "extend": THIRD, "post": THIRD, "doctor": THIRD, "slurm": GROUND,
    "report": GROUND, "card": GROUND, "ladder": GROUND,
    "kubernetes": GROUND | {"slurm"},
    "bundle": BASE, "commands": THIRD | {"serving", "extend", "post", "doctor", "slurm", "kubernetes",
                                         "report", "card", "ladder", "bundle"},
    "cli": BASE | {"commands"}, "__main__": {"cli"}, "api": GROUND, "__init__": SECOND | {"api"},
    "tokenizer": BASE, "data_prep": BASE | {"runs", "tools"},
}
"""Room -> rooms of megatron_sov that it may import besides itself; a room of the same floor only
where it is named."""

WINGS: dict[str, tuple[set[str], ...]] = {
    "megatron_sov/mcore": ({"parallel"}, {"model"}, {"optimizer", "decode"}, {"checkpoint"}),
    "megatron_sov/train": ({"guards", "side_jobs"}, {""}),
    "megatron_sov/plan": ({"speed"}, {"tables"}),
    # steps know the contract of a pipeline, and a pipeline knows steps by name alone
    "data_prep": ({"sources", "journey", "demo", "pipelines"}, {"pipeline"},
                  {"quality", "dedup", "scoring", "mixture"}, {"decontamination"}),
    "tokenizer": ({"bpe"}, {"formats"}, {"report", "graft"}, {"compare", "media"}),
}
"""Folder -> the floors of its wings from the ground up; "" stands for the files that lie in the folder
itself, and where it does not stand they are free.  A wing imports those on lower floors only."""

TORCH_FREE = GROUND - {"codecs"} | {
    "doctor", "report", "card", "ladder", "bundle", "commands", "cli", "api", "__init__",
    "tokenizer", "data_prep", "slurm", "kubernetes"}
HEAVY = {"torch", "transformers", "megatron", "vllm", "transformer_engine"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
MAY_UNPICKLE = {"megatron_sov/mcore/parallel/launcher.py", "megatron_sov/work/array_job.py",
                "megatron_sov/work/arrays.py"}
"""They pass work of ours on to processes of ours."""
STARTS = {"Popen", "Process", "Pool", "ProcessPoolExecutor", "fork", "flock", "get_context", "prctl"}
_INSIDE = "runs inside of the sandbox"
MAY_START = {"megatron_sov/mcore/parallel/launcher.py": "ranks",
             "megatron_sov/artifacts.py": "holds temporary folders",
             "megatron_sov/rewards/check_program.py": _INSIDE,
             "megatron_sov/rewards/solution_tests.py": _INSIDE}
"""File outside of work that starts processes or holds locks -> why."""
MAY_RENAME = {"megatron_sov/mcore/checkpoint/host_snapshot.py": "of a folder that has no name yet",
              "megatron_sov/runs/checkpoints.py": "sets checkpoints aside",
              "megatron_sov/commands/eval_passk.py": "into an artifact that is made"}
"""File outside of work that gives results their names by `os.rename` or `os.replace` -> why."""
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}
SAID = re.compile(r"__doc__|str\((e|error)\)|\{e\}|std(out|err)|\b(said|shown|why)\b")
"""What errors and programs say."""
_PROGRAM, _SYSTEM, _PUBLISHED = "a program's output", "a file of the kernel", "as the published rule cuts it"
CUT_ANYWHERE = {
    "megatron_sov/counterparts/settings.py": "the words of a script",
    "megatron_sov/slurm/attempts.py": _PROGRAM, "megatron_sov/slurm/submission.py": _PROGRAM,
    "megatron_sov/clusters/client.py": _PROGRAM, "megatron_sov/work/background.py": _PROGRAM,
    "data_prep/mixture/search.py": _PROGRAM, "data_prep/synth/models.py": _PROGRAM,
    "data_prep/synth/generators/code.py": _PROGRAM, "data_prep/synth/generators/tools/worlds.py": _PROGRAM,
    "megatron_sov/work/sandbox/enclosures.py": _SYSTEM, "megatron_sov/train/planning.py": _SYSTEM,
    "megatron_sov/work/sandbox/system_calls.py": _SYSTEM,
    "data_prep/journey/telling.py": "text that is shown; ends of lines that differ are told",
    "data_prep/quality/rules/step.py": _PUBLISHED}
"""File whose lines may be cut at any sign that ends one -> what they are."""
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 60


@dataclass(frozen=True)
class Source:
    """One source file under a root."""

    root: Path
    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(self.root).as_posix()

    @property
    def room(self) -> str:
        """The room of megatron_sov (`config.py` is the room `config`), or the top-level package."""
        parts = self.path.relative_to(self.root).with_suffix("").parts
        return parts[1] if parts[0] == "megatron_sov" and len(parts) > 1 else parts[0]

    @property
    def tree(self) -> ast.Module:
        return _parsed(self.path.read_text(encoding="utf-8"))

    def imports(self, top_level_only: bool = False) -> list[tuple[int, str]]:
        """Return (line, dotted name) of every import; `from a import b` gives a.b,
        since b may be a module."""
        return self._imports_at_load if top_level_only else self._all_imports

    @cached_property
    def _all_imports(self) -> list[tuple[int, str]]:
        return list(self._read_imports(False))

    @cached_property
    def _imports_at_load(self) -> list[tuple[int, str]]:
        return list(self._read_imports(True))

    def _read_imports(self, top_level_only: bool) -> Iterator[tuple[int, str]]:
        for node in _top_level(self.tree) if top_level_only else ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                package = list(self.path.relative_to(self.root).parts[:-1])
                base = package[:len(package) - node.level + 1] if node.level else []
                base += node.module.split(".") if node.module else []
                yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


@lru_cache(maxsize=1)
def _parsed(text: str) -> ast.Module:
    """Parse one file, and forget the file before it: all trees together are 240 MB."""
    return ast.parse(text)


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs on import: everything outside functions and outside `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _top_level(node)


def sources(root: Path) -> list[Source]:
    """Return all sources of the rooms, and scripts at the top such as demo.py."""
    inside = [p for package in OUR_PACKAGES for p in (root / package).rglob("*.py")]
    return [Source(root, p) for p in sorted([*inside, *root.glob("*.py")])]


def import_problems(source: Source) -> Iterator[str]:
    """Downwards only; the one door to megatron; nothing heavy where `--help` passes."""
    for line, name in source.imports():
        parts = name.split(".")
        where = f"{source.name}:{line}: imports {name}"
        if parts[0] == "megatron_sov" and len(parts) > 1 and source.room in MAY_IMPORT:
            target = parts[1]
            if target != source.room and target not in MAY_IMPORT[source.room]:
                yield f"{where}: room '{source.room}' may not import '{target}'"
        if parts[0] in {"tokenizer", "data_prep"} - {source.room} and source.room in MAY_IMPORT:
            yield f"{where}: rooms meet '{parts[0]}' in artifacts only"
        if parts[0] == "megatron" and source.room != "mcore":
            yield f"{where}: only megatron_sov/mcore imports megatron"
        if parts[:2] in (["megatron", "training"], ["megatron", "legacy"]):
            yield f"{where}: only megatron.core is used"
        if parts[0] == "apex":
            yield f"{where}: apex is not used"
        if parts[0] in PICKLES and source.name not in MAY_UNPICKLE:
            yield f"{where}: foreign files are not unpickled"
    if (source.room in TORCH_FREE or source.path.stem in ("cli", "command")
            or source.path.stem.endswith("_command")):
        for line, name in source.imports(top_level_only=True):
            if name.split(".")[0] in HEAVY:
                yield (f"{source.name}:{line}: imports {name} at module level; "
                       "import it inside the function that needs it")


def wing_problems(source: Source) -> Iterator[str]:
    """Inside a room its wings stand on floors too."""
    for folder, floors in WINGS.items():
        here = _wing(source.path, source.root / folder)
        level = {wing: i for i, wings in enumerate(floors) for wing in wings}
        if here not in level:
            continue
        for line, name in source.imports():
            target = source.root.joinpath(*name.split("."))
            there = _wing(target, source.root / folder)
            if there in level and there != here and level[there] >= level[here]:
                yield (f"{source.name}:{line}: imports {name}: wing '{here}' of {folder} may not "
                       f"import '{there}'")


def _wing(path: Path, folder: Path) -> str | None:
    """Return the sub-folder of `folder` that a module lies in, "" for a file of its own, None outside."""
    if not path.is_relative_to(folder) or path == folder:
        return None
    first = path.relative_to(folder).parts[0]
    return first if (folder / first).is_dir() else ""


def circles(found: list[Source]) -> list[str]:
    """Return the files that import each other in a loop, lazily or for types alone counted in."""
    modules = {source.name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): source
               for source in found}
    arrows = {name: {target
                     for _, imported in source.imports() for target in (imported, imported.rpartition(".")[0])
                     if target in modules and target != name and modules[target].path.name != "__init__.py"}
              for name, source in modules.items()}
    try:
        list(TopologicalSorter(arrows).static_order())
    except CycleError as e:
        return list(map(str, e.args[1]))
    return []


def room_problems(source: Source) -> Iterator[str]:
    """Every room stands in the table, so that a new one is given its floor."""
    if (source.path.parent != source.root and source.room not in MAY_IMPORT
            and source.path.name != "__init__.py"):
        yield f"{source.name}: room '{source.room}' has no floor; add it to MAY_IMPORT"


def loading_problems(source: Source) -> Iterator[str]:
    """Loaders that would unpickle a foreign file."""
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        if called == "torch.load" and ast.unparse(keywords.get("weights_only", ast.Constant(None))) != "True":
            yield f"{source.name}:{node.lineno}: torch.load needs weights_only=True"
        if ast.unparse(keywords.get("allow_pickle", ast.Constant(False))) != "False":
            yield f"{source.name}:{node.lineno}: allow_pickle must stay False"


def model_problems(source: Source) -> Iterator[str]:
    """A model that a library loads is loaded in one place, which refuses weights that it would make up."""
    for node in ast.walk(source.tree):
        if (source.name != "megatron_sov/pretrained.py" and isinstance(node, ast.Attribute)
                and node.attr == "from_pretrained" and "Tokenizer" not in ast.unparse(node.value)):
            yield (f"{source.name}:{node.lineno}: {ast.unparse(node)} makes up weights that are missing; use "
                   "megatron_sov.pretrained.load_pretrained")


def line_problems(source: Source) -> Iterator[str]:
    """Lines of data end with a newline and nothing else: `str.splitlines` also cuts at U+2028, at form feeds
    and at what separates files, which texts and records hold.  What programs and errors say may be cut so."""
    for node in ast.walk(source.tree):
        if (isinstance(node, ast.Attribute) and node.attr == "splitlines" and source.name not in CUT_ANYWHERE
                and not SAID.search(ast.unparse(node.value))):
            yield f'{source.name}:{node.lineno}: splitlines cuts data at more than newlines; use split("\\n")'


def size_problems(source: Source) -> Iterator[str]:
    """One idea per file, a function on a screen, names that say something."""
    num_lines = len(source.path.read_text(encoding="utf-8").splitlines())
    if num_lines > MAX_FILE_LINES:
        yield f"{source.name}: has {num_lines} lines, at most {MAX_FILE_LINES}"
    if set(source.path.relative_to(source.root).with_suffix("").parts) & VAGUE_NAMES:
        yield f"{source.name}: is named after nothing; name it after what it holds"
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield (f"{source.name}:{node.lineno}: {node.name} has {length} lines, "
                       f"at most {MAX_FUNCTION_LINES}")


def work_problems(source: Source) -> Iterator[str]:
    """Processes are started and locks held in one room, beside the launcher of ranks."""
    if source.name.startswith("megatron_sov/work/") or source.name in MAY_START:
        return
    for node in ast.walk(source.tree):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if (called.rpartition(".")[2] in STARTS and not called.startswith("psutil.")) or (
                isinstance(node, ast.Name) and "PR_SET_PDEATHSIG" in node.id):
            yield (f"{source.name}:{node.lineno}: {called or 'PR_SET_PDEATHSIG'}: processes and locks are "
                   "megatron_sov.work's; use what it has")


def rename_problems(source: Source) -> Iterator[str]:
    """Results get their names in one place, behind their bytes."""
    if source.name.startswith("megatron_sov/work/") or source.name in {**MAY_RENAME, **MAY_START}:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.rename", "os.replace"):
            yield (f"{source.name}:{node.lineno}: {ast.unparse(node.func)}: use new_file, new_folder or "
                   "delete_folder of megatron_sov.artifacts")


def data_problems(source: Source) -> Iterator[str]:
    """Code in a package that holds data alone: it would be a second place for the same."""
    package = source.path.relative_to(source.root).parts[0]
    only_says_what_it_is = (source.path.name == "__init__.py" and ast.get_docstring(source.tree)
                            and len(source.tree.body) == 1)
    if package in DATA_ONLY and not only_says_what_it_is:
        yield f"{source.name}: {package} holds data alone; its code belongs into megatron_sov/{package}"


RULES = (import_problems, wing_problems, room_problems, loading_problems, model_problems, line_problems,
         size_problems, work_problems, rename_problems, data_problems)


@pytest.fixture(scope="module")
def house() -> list[Source]:
    """All sources."""
    return sources(ROOT)


@pytest.fixture(scope="module")
def problems(house: list[Source]) -> dict[str, list[str]]:
    """What each rule finds, file by file, so that each is parsed once and none is kept."""
    found: dict[str, list[str]] = {rule.__name__: [] for rule in RULES}
    for source in house:
        for rule in RULES:
            found[rule.__name__] += rule(source)
    return found


@pytest.mark.parametrize("rule", [rule.__name__ for rule in RULES])
def test_the_house_keeps_its_rules(rule: str, house: list[Source], problems: dict[str, list[str]]) -> None:
    assert {"config", "artifacts", "mcore", "tokenizer", "data_prep"} <= {s.room for s in house}
    assert problems[rule] == []


def test_no_files_import_each_other_in_a_circle(tmp_path: Path, house: list[Source]) -> None:
    assert circles(house) == []
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/a.py").write_text("from tokenizer import b")
    (tmp_path / "tokenizer/b.py").write_text("def f():\n    from tokenizer.a import x")
    assert sorted(set(circles(sources(tmp_path)))) == ["tokenizer.a", "tokenizer.b"]


BAD = [
    ("megatron_sov/config/run.py", "from megatron_sov.artifacts import to_json",
     "room 'config' may not import 'artifacts'"),
    ("megatron_sov/data/order.py", "def f():\n    import megatron_sov.train.loop",
     "room 'data' may not import 'train'"),
    ("megatron_sov/data/order.py", "from ..train import loop", "room 'data' may not import 'train'"),
    ("megatron_sov/mcore/model/specs.py", "from megatron_sov import data",
     "room 'mcore' may not import 'data'"),
    ("megatron_sov/train/loop.py", "from megatron_sov import post", "room 'train' may not import 'post'"),
    ("tokenizer/train.py", "from megatron_sov.models import count",
     "room 'tokenizer' may not import 'models'"),
    ("data_prep/pack.py", "import tokenizer.train", "rooms meet 'tokenizer' in artifacts only"),
    ("data_prep/pack.py", "def f():\n    import megatron.core", "only megatron_sov/mcore imports megatron"),
    ("demo.py", "from megatron.core import parallel_state", "only megatron_sov/mcore imports megatron"),
    ("megatron_sov/mcore/model/specs.py", "from megatron.training import get_args",
     "only megatron.core is used"),
    ("megatron_sov/mcore/model/specs.py", "import apex", "apex is not used"),
    ("megatron_sov/ladder/state.py", "from megatron_sov.train import stage",
     "room 'ladder' may not import 'train'"),
    ("megatron_sov/report/page.py", "def f():\n    from megatron_sov import mcore",
     "room 'report' may not import 'mcore'"),
    ("megatron_sov/data/order.py", "import pickle", "not unpickled"),
    ("megatron_sov/recipes/tiny.py", "try:\n    import torch\nexcept ImportError:\n    torch = None",
     "at module level"),
    ("megatron_sov/commands/pretrain.py", "from transformers import AutoTokenizer", "at module level"),
    ("megatron_sov/commands/sft.py", "import torch.distributed as dist", "at module level"),
    ("megatron_sov/train/loop.py", "x = torch.load(f)", "weights_only=True"),
    ("megatron_sov/train/loop.py", "x = torch.load(f, weights_only=False)", "weights_only=True"),
    ("megatron_sov/data/order.py", "x = np.load(f, allow_pickle=True)", "allow_pickle"),
    ("megatron_sov/eval/lm/local.py", "m = AutoModelForCausalLM.from_pretrained(f)", "makes up weights"),
    ("data_prep/pack.py", "from_f = transformers.AutoModel.from_pretrained", "makes up weights"),
    ("megatron_sov/data/order.py", "x = text.splitlines()", "cuts data at more than newlines"),
    ("megatron_sov/data/utils.py", "", "named after nothing"),
    ("megatron_sov/cellar/wine.py", "", "has no floor"),
    ("megatron_sov/slurm/stages.py", "from megatron_sov.commands import eval",
     "room 'slurm' may not import 'commands'"),
    ("megatron_sov/slurm/chain.py", "from megatron_sov.train import stage_config",
     "room 'slurm' may not import 'train'"),
    ("slurm/__init__.py", "import megatron_sov.version", "slurm holds data alone"),
    ("slurm/chains.py", "", "slurm holds data alone"),
    ("megatron_sov/data/order.py", "x = 1\n" * 601, "has 601 lines"),
    ("megatron_sov/data/order.py", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
]


@pytest.mark.parametrize(("name", "text", "expected"), BAD)
def test_each_rule_sees_its_breach(tmp_path: Path, name: str, text: str, expected: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    problems = [problem for source in sources(tmp_path) for rule in RULES for problem in rule(source)]
    assert len(problems) == 1
    assert expected in problems[0]
    assert problems[0].startswith(name)


def test_a_wing_sees_only_what_lies_below_it(tmp_path: Path) -> None:
    for wing in ("parallel", "model", "optimizer", "decode"):
        (tmp_path / "megatron_sov/mcore" / wing).mkdir(parents=True)
    mcore = tmp_path / "megatron_sov/mcore"
    (mcore / "parallel/world.py").write_text("from megatron_sov.mcore.model import specs")
    (mcore / "model/specs.py").write_text("from megatron_sov.mcore.parallel import world")
    (mcore / "decode/cached.py").write_text(
        "def f():\n    from megatron_sov.mcore.optimizer.muon import Muon")
    assert [problem for source in sources(tmp_path) for problem in wing_problems(source)] == [
        "megatron_sov/mcore/decode/cached.py:2: imports megatron_sov.mcore.optimizer.muon.Muon: "
        "wing 'decode' of megatron_sov/mcore may not import 'optimizer'",
        "megatron_sov/mcore/parallel/world.py:1: imports megatron_sov.mcore.model.specs: "
        "wing 'parallel' of megatron_sov/mcore may not import 'model'"]


def test_lazy_and_type_checking_imports_are_allowed_where_torch_is_not(tmp_path: Path) -> None:
    path = tmp_path / "megatron_sov/commands/pretrain.py"
    path.parent.mkdir(parents=True)
    path.write_text("from typing import TYPE_CHECKING\n"
                    "if TYPE_CHECKING:\n    import torch\ndef run():\n    import torch\n")
    assert [problem for source in sources(tmp_path) for rule in RULES for problem in rule(source)] == []
