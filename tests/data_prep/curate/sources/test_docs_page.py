"""docs/data_pipeline.md: its snippets print the shown output, and it names every format, option and code."""

import ast
import contextlib
import dataclasses
import io
import re
from pathlib import Path

import pytest

from data_prep.curate.sources.formats import FORMATS, load_reader_class

ROOT = Path(__file__).parents[4]
PAGE = (ROOT / "docs/data_pipeline.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```\n.*?^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("snippet", "shown"), SNIPPETS)
def test_snippets_print_the_shown_output(cwd: Path, snippet: str, shown: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "data_pipeline.md", "exec"), {})
    assert printed.getvalue() == shown and len(SNIPPETS) == 2


def test_every_format_and_every_option_is_named() -> None:
    options = {field.name for name in FORMATS
               for field in dataclasses.fields(load_reader_class(name).Options)}
    assert not [name for name in sorted({*FORMATS, *options})
                if f"`{name}" not in PAGE and f"{name}:" not in PAGE]


def test_every_code_is_named() -> None:
    codes = {"utf8", "json"}  # from megatron_sov.base.documents.records
    for file in (ROOT / "data_prep/curate/sources").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("BadRecord", "_Excluded"):
                code = node.args[0]
                if isinstance(code, ast.Constant):
                    codes.add(code.value)
    assert len(codes) > 15
    assert not sorted(code for code in codes if f"`{code}`" not in PAGE)
