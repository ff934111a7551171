"""mkdocs hook: build the page "Commands and tests", with a count of tested commands per page."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from tests.pages_typed import (
    PAGE_TESTS, PAGES, get_page_name, iter_command_lines, list_commands, shell_blocks)

HEAD = """# Commands and tests

Every line of every shell block on these pages is held by a test (`tests/test_docs.py`). A command of ours is
parsed by the parser that it would meet, and `--set` of a training command is applied to its recipe; other
programs' lines are of a kind that `tests/pages_typed.py` knows. Commands of many pages are typed as well, in
their order, into a folder with small data: by the test that stands beside them, which says what it leaves
out or makes smaller.

| page | shell blocks | our commands | other lines | typed by |
|---|---|---|---|---|
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add `commands.md`."""
    files.append(File.generated(config, "commands.md", content=build_page()))
    return files


def build_page() -> str:
    rows, sums, num_typed = [], [0, 0, 0], 0
    for path in PAGES:
        text, name = path.read_text(encoding="utf-8"), get_page_name(path)
        blocks = shell_blocks(text)
        num_commands = len(list_commands(text))
        num_foreign = sum(1 for line in iter_command_lines(blocks)
                          if not list_commands(f"```sh\n{line}\n```\n"))
        counts = [len(blocks), num_commands, num_foreign]
        if name in PAGE_TESTS:
            num_typed += num_commands
        if any(counts):
            rows.append(f"| {name} | {' | '.join(map(str, counts))} | {PAGE_TESTS.get(name, 'parsed')} |\n")
            sums = [total + count for total, count in zip(sums, counts, strict=True)]
    rows.append(f"| **all** | {' | '.join(map(str, sums))} | {num_typed} commands stand on pages that are "
                "typed |\n")
    return HEAD + "".join(rows)
