"""Commands shown on pages: which shell lines are ours, which test runs them, and which other programs are
allowed.

tests/test_docs.py asks, and docs/site/proof.py makes a page of the site of the answers.
"""

import importlib
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
"""What agents read, held as pages are."""
ENTRIES = {"megatron-sov": "megatron_sov.cli", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}

TYPED = {
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
"""Page -> the test that types its commands, or all of them but those that it names; of the others every
command is parsed, and its settings are applied to the recipe."""

SHELL = {
    "make": "its target stands in the Makefile", "pip": "its extra stands in setup.py",
    "python": "its script exists", "docker": "tests/test_containers.py",
    "apptainer": "tests/test_containers.py",
    "srun": "tests/operate/slurm", "salloc": "tests/operate/slurm", "sbatch": "tests/operate/slurm",
    ".": "the shell's own", "cd": "the shell's own", "export": "the shell's own", "mkdir": "the shell's own",
    "cp": "the shell's own", "cat": "the shell's own", "git": "not run", "curl": "not run",
    "printf": "tests/serve/test_chat.py",

}
"""First word of a line that begins none of our programs -> what holds it."""


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


def lines_of(blocks: list[str]) -> Iterator[str]:
    """Yield normalized command lines: continuations are joined; prompts, environment variables, paths of
    programs and container prefixes are removed; of torchrun on several nodes only the number of processes
    remains."""
    for block in blocks:
        for typed in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"^(?:[A-Z_]+=\S* )+", "", typed.strip().removeprefix("$ "))
            line = re.sub(r"^(?:[\w./-]*/)?bin/", "", line)
            line = re.sub(r"^apptainer exec \S+ \S+ megatron-sov ", "megatron-sov ", line)
            if found := re.match(r"torchrun (.*) -m -- megatron_sov (.*)", line):
                words = shlex.split(found[1])
                nodes, ranks = (int(words[words.index(option) + 1]) if option in words else 1
                                for option in ("--nnodes", "--nproc-per-node"))
                line = f"megatron-sov {found[2]} --nproc {nodes * ranks}"
            if line and not line.startswith("#"):
                yield line


def commands_of(text: str) -> list[str]:
    """Return our commands in all fenced blocks of a page."""
    return [line for line in lines_of(blocks(text, "[a-z]*")) if line.split(" ")[0] in ENTRIES]


def parse(line: str) -> Any:
    """Read a command as the program itself would, up to its own work."""
    program, *argv = shlex.split(line, comments=True)
    if program != "megatron-sov":
        return read_command_options(importlib.import_module(ENTRIES[program]).build_parser().parse_args(argv))
    name, rest = cli.split_command(argv)
    parser = Parser(prog=f"megatron-sov {name}")
    cli.COMMANDS[name].load().add_arguments(parser)
    return read_command_options(parser.parse_args(rest))


def unheld(line: str) -> str:
    """Return why nothing holds a line of a shell block, "" where something does."""
    word, *rest = line.split()
    if word in ENTRIES:
        return ""  # parsed
    if word not in SHELL:
        return f"{word}: nothing holds it; name what does in SHELL of tests/pages_typed.py"
    if word == "make" and not re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
        return f"make {rest[0]}: is no target of the Makefile"
    if word == "pip":
        setup = (ROOT / "setup.py").read_text()
        extras = [name for found in re.findall(r"\[([\w,]+)\]", line) for name in found.split(",")]
        unknown = [name for name in extras if f'"{name}": [' not in setup]
        return f"pip: {', '.join(unknown)} is no extra of setup.py" if unknown else ""
    if word == "python" and rest[0].endswith(".py") and not (ROOT / rest[0]).is_file():
        return f"python {rest[0]}: there is no such file"
    return ""


def name_of(page: Path) -> str:
    """Return a page's path from the root."""
    return page.relative_to(ROOT).as_posix()
