"""The libraries of formats: missing ones are refused before anything is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data_prep import cli
from data_prep.curate.sources.formats import LIBRARIES
from data_prep.libraries import require
from megatron_sov.base.errors import format_install_command

PIPELINE = """name: small
sources:
  - {name: pages, path: pages, format: html}
"""


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A folder with a pipeline over one page."""
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/a.html").write_text("<article><p>A page with some words.</p></article>")
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return tmp_path


@pytest.mark.parametrize("library", ["resiliparse"])
def test_without_a_library_nothing_is_begun(pages: Path, library: str, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert cli.main(["run", str(pages / "pipeline.yaml"), "--output", str(pages / "out")]) == 2
    said = capsys.readouterr().err
    assert f"needs {library}, which is not installed; {format_install_command('data')}" in said
    assert not (pages / "out").exists()


def test_what_formats_need_is_here() -> None:
    assert all(require(name, *libraries) == [] for name, libraries in LIBRARIES.items())
    assert require("it", "json", "no_such_one", "nor_this") == [
        f"it needs no_such_one and nor_this, which are not installed; {format_install_command('data')}"]
