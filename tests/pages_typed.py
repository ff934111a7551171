"""Commands shown on pages: which shell lines are ours, which test runs them, and which other programs are
allowed.

tests/test_docs.py checks the pages with it, and docs/site/proof.py shows the result on the site.
"""

import importlib
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sov import cli
from megatron_sov.base.command_line import Parser
from megatron_sov.base.settings import read_command_options

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SKILLS = sorted((ROOT / "skills").glob("*/SKILL.md"))
"""Instructions for agents, tested like pages."""
ENTRIES = {"megatron-sov": "megatron_sov.cli", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}

PAGE_TESTS = {
    "README.md": "tests/test_readme.py",
    "docs/convert.md": "tests/convert/test_convert_page.py",
    "docs/data.md": "tests/test_docs_data.py",
    "docs/data_pipeline.md": "tests/test_docs_data.py",
    "docs/data_quality.md": "tests/test_docs_data.py",
    "docs/distill.md": "tests/test_tutorials.py",
    "docs/eval.md": "tests/eval/test_eval_pages.py",
    "docs/eval_lm.md": "tests/eval/test_eval_pages.py",
    "docs/omni.md": "tests/test_docs_omni.py",
    "docs/own_code.md": "tests/test_own_code.py",
    "docs/plan.md": "tests/test_docs_plan.py",
    "docs/rewards.md": "tests/commands/test_score.py",
    "docs/real_model.md": "tests/benchmarks/test_real_model.py",
    "docs/serve.md": "tests/serve/test_serve.py",
    "docs/slurm.md": "tests/operate/slurm/test_submit.py",
    "docs/synth_generators.md": "tests/test_docs_synth.py",
    "docs/tokenizer.md": "tests/test_docs_data.py",
    "docs/tools.md": "tests/commands/rl/test_tools.py",
    "docs/tutorials/cluster.md": "tests/test_tutorials.py",
    "docs/tutorials/context.md": "tests/test_tutorials.py",
    "docs/tutorials/language.md": "tests/test_tutorials.py",
    "docs/tutorials/lora.md": "tests/test_tutorials.py",
    "docs/tutorials/preferences.md": "tests/test_tutorials.py",
    "docs/tutorials/pretrain.md": "tests/test_tutorials.py",
    "docs/tutorials/publish.md": "tests/test_tutorials.py",
    "docs/tutorials/rl.md": "tests/test_tutorials.py",
}
"""Page -> test that runs its commands, with the exceptions that the test names. Commands of other pages are
parsed, and their settings applied to the recipe."""

OTHER_PROGRAMS = {
    "make": "its target is in the Makefile", "pip": "its extra is in setup.py",
    "python": "its script exists", "docker": "tests/test_containers.py",
    "apptainer": "tests/test_containers.py",
    "srun": "tests/operate/slurm", "salloc": "tests/operate/slurm", "sbatch": "tests/operate/slurm",
    ".": "the shell's own", "cd": "the shell's own", "export": "the shell's own", "mkdir": "the shell's own",
    "cp": "the shell's own", "cat": "the shell's own", "git": "not run", "curl": "not run",
    "printf": "tests/serve/test_chat.py",
}
"""First word of a shell line with another program -> how the line is tested."""


def page_text(name: str) -> str:
    """Return the text of a page in docs."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def page_section(name: str, heading: str) -> str:
    """Return the text under a heading of level 2 of a page in docs."""
    return page_text(name).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a page in a language (a pattern: `sh|bash`)."""
    return re.findall(rf"^```(?:{language})\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shell_blocks(text: str) -> list[str]:
    """Return the shell blocks of a page."""
    return blocks(text, "sh|bash")


def shell_lines(text: str, language: str = "sh|bash") -> list[str]:
    """Return the lines of a page's shell blocks, continued lines joined."""
    return [line for block in blocks(text, language) for line in block.replace("\\\n", " ").splitlines()]


def shown_files(text: str) -> dict[str, str]:
    """Return name -> content of the blocks that follow the name of a file."""
    return dict(re.findall(r"^`([\w.-]+\.[a-z]+)`:\n\n```[a-z]+\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def iter_command_lines(blocks: list[str]) -> Iterator[str]:
    """Yield normalized command lines: continuations are joined; prompts, environment variables, paths of
    programs and container prefixes are removed; of torchrun on several nodes only the number of processes
    remains."""
    for block in blocks:
        for typed in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"^(?:[A-Z_]+=\S* )+", "", typed.strip().removeprefix("$ "))
            line = re.sub(r"^(?:[\w./-]*/)?bin/", "", line)
            line = re.sub(r"^apptainer exec \S+ \S+ megatron-sov ", "megatron-sov ", line)
            if match := re.match(r"torchrun (.*) -m -- megatron_sov (.*)", line):
                words = shlex.split(match[1])
                options = dict(itertools.pairwise(words))
                num_ranks = int(options.get("--nnodes", 1)) * int(options.get("--nproc-per-node", 1))
                line = f"megatron-sov {match[2]} --nproc {num_ranks}"
            if line and not line.startswith("#"):
                yield line


def list_commands(text: str) -> list[str]:
    """Return our commands in all fenced blocks of a page."""
    return [line for line in iter_command_lines(blocks(text, "[a-z]*")) if line.split(" ")[0] in ENTRIES]


def parse(line: str) -> Any:
    """Read a command as the program itself would, up to its own work."""
    program, *argv = shlex.split(line, comments=True)
    if program != "megatron-sov":
        return read_command_options(importlib.import_module(ENTRIES[program]).build_parser().parse_args(argv))
    name, rest = cli.split_command(argv)
    parser = Parser(prog=f"megatron-sov {name}")
    cli.COMMANDS[name].load().add_arguments(parser)
    return read_command_options(parser.parse_args(rest))


def explain_untested(line: str) -> str:
    """Return why a line of a shell block is untested, or "" if it is tested."""
    word, *rest = line.split()
    if word in ENTRIES:
        return ""  # parsed
    if word not in OTHER_PROGRAMS:
        return f"{word}: is untested; add its test to OTHER_PROGRAMS in tests/pages_typed.py"
    if word == "make" and not re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
        return f"make {rest[0]}: is no target of the Makefile"
    if word == "pip":
        setup = (ROOT / "setup.py").read_text()
        extras = [name for extras_text in re.findall(r"\[([\w,]+)\]", line)
                  for name in extras_text.split(",")]
        unknown = [name for name in extras if f'"{name}": [' not in setup]
        return f"pip: {', '.join(unknown)} is no extra of setup.py" if unknown else ""
    if word == "python" and rest[0].endswith(".py") and not (ROOT / rest[0]).is_file():
        return f"python {rest[0]}: there is no such file"
    return ""


def get_page_name(page: Path) -> str:
    """Return a page's path from the root."""
    return page.relative_to(ROOT).as_posix()
