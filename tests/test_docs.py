"""Pages: their commands parse, their links resolve, and generated pages are up to date."""

import ast
import dataclasses
import importlib
import importlib.util
import math
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from megatron_sov import cli, recipes
from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import is_reference
from megatron_sov.model.config import ParallelConfig, apply_settings
from megatron_sov.model.families.count import count_params
from megatron_sov.model.recipes.requested import BuiltIn, request_training
from megatron_sov.model.recipes.stage_defaults import build_base_config, refuse_pretraining_rate
from tests.pages_typed import (
    ENTRIES, PAGE_TESTS, PAGES, ROOT, SKILLS, explain_untested, get_page_name, iter_command_lines,
    list_commands, page_section, parse, shell_blocks)

sys.path.append(str(ROOT / "benchmarks"))
from learning import PLACEHOLDER, Recipe, find_recipes

READ = [*PAGES, *SKILLS]
KEYS_OF_TWO_CELLS = ("docs/memory.md", "docs/omni.md", "docs/recipes.md", "docs/synth_generators.md")
"""Pages with tables whose rows are identified by their first two cells."""
TRAINS: dict[str, BuiltIn] = {"pretrain": "lm", "extend": "lm", "sft": "sft", "prefer": "preference",
                              "distill": "distill", "rl run": "policy", "rl train": "policy"}
"""Command -> built-in objective that it trains."""

CLAIMED = {PLACEHOLDER.sub("0", command).partition(" > ")[0]
           for file in find_recipes() for command in Recipe(file).commands()
           if command.split()[0] in ENTRIES}
"""Commands of the claims, with 0 for every placeholder."""
COMMANDS = sorted(CLAIMED.union(*(list_commands(page.read_text()) for page in READ)))


@pytest.mark.essential
@pytest.mark.each("line", COMMANDS)
def test_every_command_on_a_page_parses(line: str) -> None:
    parse(line)


@pytest.mark.essential
@pytest.mark.each("line", [line for line in COMMANDS if line.startswith("megatron-sov ")
                           and cli.split_command(line.split()[1:])[0] in TRAINS])
def test_every_setting_on_a_page_is_valid_for_its_recipe(line: str) -> None:
    """With the command's number of processes, or any fitting number if the environment decides."""
    args = parse(line)
    command = cli.split_command(line.split()[1:])[0]
    trains_by = TRAINS[command]
    # tests/test_own_code.py runs commands with user code
    if line in list_commands((ROOT / "docs/own_code.md").read_text()) or is_reference(args.recipe or ""):
        return
    stage = None if trains_by == "lm" else trains_by
    if args.configs:  # files of a page, which its test writes
        return
    model = recipes.get("tiny-solar-open").model  # stands for the model of --from
    request = request_training(
        args, trains_by, needs_data=False, lengthens=command == "extend",
        of_model=None if stage is None else lambda: build_base_config("model", model, "fp32", stage))
    options = {"preference.method": getattr(args, "method", None),
               "distillation.top_k": getattr(args, "top_k", None)}
    config = request.config(own=[f"{key}={value}" for key, value in options.items() if value is not None])
    if stage is not None and args.recipe is not None and recipes.get(args.recipe).objective.name == "lm" \
            and not any(setting.startswith("optim.lr=") for setting in args.settings):
        refuse_pretraining_rate(config, stage, count_params(config.model).total, ())
    layout = config.parallel
    assert config.problems(args.nproc or math.lcm(layout.tp * layout.pp * layout.cp,
                                                  layout.etp * layout.ep * layout.pp)) == []


@pytest.mark.each("line", [
    c for c in COMMANDS if re.match(r"megatron-sov (generate|serve|eval|convert) .*--nproc", c)])
def test_layouts_on_pages_fit_a_model_with_experts(line: str) -> None:
    """Tests that run these pages leave several processes to other tests."""
    args = parse(line)
    config = dataclasses.replace(recipes.get("solar-open-102b"), parallel=ParallelConfig())
    options = args.settings if hasattr(args.settings, "settings") else args
    layout = apply_settings(config, options.settings).parallel
    assert layout != config.parallel and layout.problems(config.model, options.nproc) == []


def test_commands_are_listed_and_invalid_ones_fail() -> None:
    text = "megatron-sov outside\n```bash\n$ megatron-sov doctor \\\n  --json  # why\nls\n"
    text += "A=1 .venv/bin/megatron-sov doctor --jsno\n```\n"
    good, bad = list_commands(text)
    assert parse(good).json is True
    with pytest.raises(UserError, match="--jsno"):
        parse(bad)


@pytest.mark.each("page", READ)
def test_every_line_of_a_shell_block_is_tested(page: Path) -> None:
    lines = list(iter_command_lines(shell_blocks(page.read_text())))
    assert [problem for problem in map(explain_untested, lines) if problem] == []


def test_an_untested_shell_line_is_detected() -> None:
    lines = ["make tea", "pip install -e '.[docs,tea]'", "python benchmarks/tea.py", "brew tea"]
    assert [explain_untested(line) for line in lines] == [
        "make tea: is no target of the Makefile", "pip: tea is no extra of setup.py",
        "python benchmarks/tea.py: there is no such file",
        "brew: is untested; add its test to OTHER_PROGRAMS in tests/pages_typed.py"]


def test_every_shell_block_is_valid_bash() -> None:
    """All blocks in one script, each in its own function; placeholders such as <name> must be quoted."""
    script = "".join(f"f() {{\n{block}\n}}\n" for page in READ for block in shell_blocks(page.read_text()))
    completed = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (completed.returncode, completed.stderr) == (0, "")


@pytest.mark.each("page", PAGE_TESTS)
def test_pages_declared_as_tested_are_tested(page: str) -> None:
    typing = (ROOT / PAGE_TESTS[page]).read_text()
    assert Path(page).name in typing or Path(page).stem in typing
    assert re.search(r"\b(main|run_command|run_checked|read_output|MAINS\[\w+\]|launch)\(", typing)
    assert list_commands((ROOT / page).read_text())


def list_links(page: Path) -> list[tuple[Path, str]]:
    """Return the targets of a page's links into the repository: (file or folder, heading or "")."""
    result = re.findall(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)", page.read_text())
    return [((page.parent / target).resolve() if target else page, anchor) for target, anchor in result]


@cache
def read_sections(page: Path) -> dict[str, str]:
    """Return link anchor -> text below the heading, up to the next heading of its level or above; "" is the
    text before the first."""
    text = page.read_text()
    text_without_code = re.sub(r"^```.*?^```", lambda code: re.sub(r"^#", " ", code[0], flags=re.MULTILINE),
                               text, flags=re.MULTILINE | re.DOTALL)
    sections = {"": re.split(r"^## ", text_without_code, flags=re.MULTILINE)[0]}
    for match in re.finditer(r"^(#+) (.+)$", text_without_code, re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", match[2].lower()).split()
        below = re.split(rf"^#{{1,{len(match[1])}}} ", text_without_code[match.end():], flags=re.MULTILINE)[0]
        sections["-".join(words)] = below
    return sections


@pytest.mark.each("page", READ)
def test_links_lead_to_files_and_their_headings(page: Path) -> None:
    assert [(target, anchor) for target, anchor in list_links(page) if not target.exists()
            or (target in READ and anchor not in read_sections(target))] == []


QUESTIONS = re.findall(r"^\| (.+\?)[^|]* \| `([^`]+)` \| \[[^]]+\]\(([\w/]+\.md)(?:#([\w-]+))?\) \|$",
                       (ROOT / "docs/index.md").read_text(), re.MULTILINE)


@pytest.mark.each(("question", "command", "page", "heading"), QUESTIONS)
def test_a_new_user_finds_the_answer_in_two_clicks(question: str, command: str, page: str,
                                                   heading: str) -> None:
    """From the README: first a page, then the heading above the command."""
    assert len(QUESTIONS) == 20
    answer = ((ROOT / "docs" / page).resolve(), heading)
    clicked = [ROOT / "README.md",
               *(target for target, _ in list_links(ROOT / "README.md") if target in READ)]
    assert answer in {link for near in clicked for link in list_links(near)}, question
    assert command in " ".join(read_sections(answer[0])[heading].replace("\\\n", " ").split()), (
        f"{page} does not say {command}")
    if command.startswith("megatron-sov "):
        parse(command)


@pytest.mark.each("skill", SKILLS)
def test_skills_state_subject_and_use(skill: Path) -> None:
    front, text = re.split(r"^---$", skill.read_text(), flags=re.MULTILINE)[1:3]
    front_matter = yaml.safe_load(front)
    assert front_matter.keys() == {"name", "description"} and front_matter["name"] == skill.parent.name
    assert " Use when " in front_matter["description"] and len(front_matter["description"]) <= 1024
    assert len(text.splitlines()) <= 120 and len(list_commands(text)) >= 8
    assert len(SKILLS) == 5
    assert f"skills/{front_matter['name']}/SKILL.md)" in (ROOT / "docs/llms.txt").read_text()


@pytest.mark.each("page", READ)
def test_table_rows_have_as_many_cells_as_the_header(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    cells = [[len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()] for table in tables]
    assert [table.splitlines()[0] for table, counts in zip(tables, cells, strict=True)
            if len(set(counts)) > 1] == []


def parse_tables(text: str) -> list[list[list[str]]]:
    """Return the tables of a page as lists of rows of cells, without header and ruler."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [[[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table.splitlines()[2:]]
            for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]


@pytest.mark.each("page", READ)
def test_tables_have_no_duplicate_rows(page: Path) -> None:
    if get_page_name(page) not in KEYS_OF_TWO_CELLS:
        for rows in parse_tables(page.read_text()):
            names = [re.findall("`[^`]*`", row[0])[:1] or [row[0]] for row in rows if row[0]]
            assert [name for name in names if names.count(name) > 1] == []


def test_the_page_lists_all_extras() -> None:
    match = re.search(r"^EXTRAS = (\{.*?^\})", (ROOT / "setup.py").read_text(), re.MULTILINE | re.DOTALL)
    assert match is not None
    extras = ast.literal_eval(match[1])
    section = (ROOT / "docs/install.md").read_text().partition("\n## Extras\n")[2].partition("\n## ")[0]
    rows = {row[0].strip("`"): row[2] for table in parse_tables(section) for row in table}
    assert sorted(rows) == sorted(extras)
    assert ({name for name, use in rows.items() if "part of `dev`" in use}
            == {name for name, needs in extras.items() if name != "dev" and set(needs) <= set(extras["dev"])})


def test_no_page_installs_the_project_by_name() -> None:
    """No package index has the project, so a stranger who registers the name could execute code."""
    folders = [ROOT / name for name in ("megatron_sov", "data_prep", "tokenizer", "layout_proof", "slurm",
                                        "docs", "containers", "benchmarks", "examples")]
    files = [*ROOT.glob("*.*"), *(p for folder in folders for p in folder.rglob("*"))]
    texts = [p for p in files if (p.suffix in (".py", ".md", ".sh", ".yaml", ".j2", ".def") and p.is_file())
             or p.name in ("Makefile", "Dockerfile")]
    assert len(texts) > 900
    by_name = re.compile(r"megatron[-_]sov\[|install\s+(-\S+\s+)*['\"`]?megatron[-_]sov\b")
    assert [p for p in texts if by_name.search(p.read_text(encoding="utf-8"))] == []


GENERATED = ("config", "memory", "options", "recipes", "results")
MAX_CELL_WORDS = 20
NUM_READ_PAGES = 40


def test_pages_to_read_are_few() -> None:
    """Those below "Reference" and "Evidence" are looked up."""
    index = (ROOT / "docs/index.md").read_text()
    listed = re.findall(r"^\| \[([\w/]+\.md)\]\(\1\)", index.partition("\n## Reference\n")[0], re.MULTILINE)
    assert len(listed) + 1 <= NUM_READ_PAGES


@pytest.mark.each("section", ["Data", "Train", "Post-train", "Evaluate and publish", "Operate"])
def test_a_page_of_a_job_shows_output_faults_and_reference(section: str) -> None:
    rows = page_section("index.md", section)
    listed = re.findall(r"^\| \[(\w+\.md)\]\(\1\)", rows, re.MULTILINE)
    assert len(listed) >= 3
    for name in listed:
        text = (ROOT / "docs" / name).read_text()
        assert re.search(r"^```(text|python)?\n", text, re.MULTILINE), name
        assert re.search(r"^## What goes wrong", text, re.MULTILINE), name
        assert re.search(r"^Reference: ", text, re.MULTILINE), name


@pytest.mark.each("page", [page for page in PAGES if page.stem not in GENERATED])
def test_cells_of_tables_are_short(page: Path) -> None:
    """Code counts as one word."""
    cells = [cell for rows in parse_tables(page.read_text()) for row in rows for cell in row]
    assert [cell for cell in cells if len(re.sub(r"`[^`]*`", "x", cell).split()) > MAX_CELL_WORDS] == []


def test_the_index_lists_every_page_once() -> None:
    listed = re.findall(r"^\| \[([\w/]+\.md)\]\(\1\)", (ROOT / "docs/index.md").read_text(), re.MULTILINE)
    pages = {get_page_name(page).removeprefix("docs/")
             for page in PAGES if get_page_name(page).startswith("docs/")}
    assert sorted(listed) == sorted(pages - {"index.md"})


def test_the_page_of_options_lists_every_command() -> None:
    """Each row links the command's own page, which exists."""
    page = (ROOT / "docs/options.md").read_text()
    for program, module in ENTRIES.items():
        for name, command in importlib.import_module(module).COMMANDS.items():
            assert f"| `{program} {name}` | {command.help} | [{command.page}]({command.page}) |" in page
            assert (ROOT / "docs" / command.page).is_file()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90


def test_make_test_needs_no_package_index() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = dict(re.findall(r"^(\w+):([^#\n]*)", makefile, re.MULTILINE))
    assert not {"slurm", "browser"} & set(f"{targets['test']} {targets['suite']}".split())
    for page in ("CONTRIBUTING.md", "docs/install.md"):  # `make deep` does
        assert "make deep" in (ROOT / page).read_text(), page


def test_the_house_page_shows_every_hall() -> None:
    tree = (ROOT / "docs/house.md").read_text()
    halls = [f"{p.name}/" if p.is_dir() else p.name for p in (ROOT / "megatron_sov").iterdir()
             if not p.name.startswith("_") and (p.suffix == ".py" or (p / "__init__.py").is_file())]
    assert [hall for hall in halls if f" {hall}" not in tree] == []


def test_llms_txt_has_a_line_for_every_page() -> None:
    """The file lists the pages of the index for programs, with their subjects."""
    text = (ROOT / "docs/llms.txt").read_text()
    lines = dict(re.findall(r"^- \[([\w/]+\.md)\]\(\1\): (.+)$", text, re.MULTILINE))
    rows = dict(re.findall(r"^\| \[([\w/]+\.md)\]\(\1\) \| (.+) \|$", (ROOT / "docs/index.md").read_text(),
                           re.MULTILINE))
    assert lines == rows


@pytest.mark.essential
@pytest.mark.parametrize(("name", "page"), [("config", "config.md"), ("options", "options.md"),
                                            ("recipes", "recipes.md"),
                                            ("results", "results.md"), ("index", "llms.txt"),
                                            ("house", "pictures/house.svg")])
def test_generated_pages_are_up_to_date(name: str, page: str) -> None:
    spec = importlib.util.spec_from_file_location(f"generate_{name}", ROOT / f"docs/generate_{name}.py")
    assert spec is not None and spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    committed = (ROOT / f"docs/{page}").read_text()
    assert committed == generator.build_page(), f"docs/{page} is stale: run `make docs`"


CLAIMED_PLACES = re.findall(r"^\| ([^|]+) \| \[[^]]*\]\(\.\./([^)]+)\)[^|]*\| `(\w+)` \|$",
                            (ROOT / "docs/house.md").read_text(), re.MULTILINE)


@pytest.mark.each(("subject", "file", "name"), CLAIMED_PLACES)
def test_file_contents_claimed_on_a_page_exist(subject: str, file: str, name: str) -> None:
    assert len(CLAIMED_PLACES) > 20
    assert re.search(rf"(def|class) {name}\b|^ *{name}\b.*=|^ *{name}: |\.{name}\b",
                     (ROOT / file).read_text(), re.MULTILINE), subject


REGISTRIES = [(name, file) for names, files in re.findall(
    r"((?:`\w+`(?: and )?)+) in ((?:`[\w/]+\.py`(?:, | or )?)+)", (ROOT / "CONTRIBUTING.md").read_text())
    for name in re.findall(r"`(\w+)`", names) for file in re.findall(r"`([^`]+)`", files)]


@pytest.mark.each(("name", "file"), REGISTRIES)
def test_registries_named_for_contributors_exist(name: str, file: str) -> None:
    assert len(REGISTRIES) > 15
    assert re.search(rf"^(def |class | +)?{name}\b", (ROOT / file).read_text(), re.MULTILINE)
