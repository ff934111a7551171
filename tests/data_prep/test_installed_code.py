"""Steps of pipelines, formats of sources and generators that an installed package declares."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep import cli
from data_prep.curate.pipeline.step import step_class, step_names
from data_prep.curate.sources.formats import LIBRARIES, format_problems, reader_class
from data_prep.curate.sources.source import SourceSettings
from data_prep.libraries import require
from data_prep.synth.known import generator_class, generator_names
from megatron_sov.base.errors import UserError, how_to_install
from megatron_sov.base.settings import problems_of

CODE = '''
from dataclasses import dataclass
from data_prep.curate.pipeline.step import Step, StepOutcome
from data_prep.curate.sources.lines import TextReader
from data_prep.synth.generator import Generator

@dataclass(frozen=True)
class Settings:
    """What is shouted."""

    mark: str = "!"
    """Behind each text."""

class Shout(Step):
    kind, shorthand, Settings = "shout", "mark", Settings

    def outcomes(self, documents):
        return [StepOutcome(text=d.text.upper() + self.settings.mark) for d in documents]

class Notes(TextReader):
    format = "notes"

class Riddles(Generator):
    name, kind, help, templates, Settings = "riddles", "text", "make riddles", {}, Settings

    def items(self, inputs):
        yield from ()

    def make(self, item, ask):
        yield from ()
'''
ENTRIES = """[megatron_sov.pipeline_steps]
shout = tiny_lab:Shout
[megatron_sov.source_formats]
notes = tiny_lab:Notes
[megatron_sov.generators]
riddles = tiny_lab:Riddles
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return `install(entries)`: a tiny distribution by hand, on the path of all processes."""

    def install(entries: str = ENTRIES) -> None:
        folder = tmp_path / "site"
        info = folder / "tiny_lab-1.2.dist-info"
        info.mkdir(parents=True)
        (folder / "tiny_lab.py").write_text(CODE)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-lab\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(entries)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))

    return install


def test_a_pipeline_names_an_installed_step_and_format(install: Callable[..., None], tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    install()
    (tmp_path / "web.txt").write_text("a quiet word")
    (tmp_path / "pipeline.yaml").write_text(
        "name: loud\nsources:\n  - {name: web, path: web.txt, format: notes}\nsteps:\n  - shout: '?'\n")
    assert "shout" in step_names() and step_class("shout").__name__ == "Shout"
    code = cli.main(["run", str(tmp_path / "pipeline.yaml"), "--output", str(tmp_path / "out"),
                     "--workers", "1"])
    assert code == 0, capsys.readouterr().err
    (file,) = (tmp_path / "out/text").rglob("*.parquet")
    assert pq.read_table(file)["text"].to_pylist() == ["A QUIET WORD?"]


def test_a_source_names_an_installed_format(install: Callable[..., None]) -> None:
    assert "must be one of" in format_problems("notes", {})[0].rule
    install()
    assert reader_class("notes").__name__ == "Notes" and format_problems("notes", {}) == []
    (problem,) = format_problems("note", {})
    assert "notes" in str(problem)


def test_the_command_line_names_an_installed_generator(install: Callable[..., None],
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    install()
    assert "riddles" in generator_names() and generator_class("riddles").__name__ == "Riddles"
    assert cli.main(["synth", "--list"]) == 0
    assert "riddles              make riddles" in capsys.readouterr().out


@pytest.mark.parametrize(("group", "find", "what"), [
    ("pipeline_steps", step_class, "a step of a pipeline is a subclass"),
    ("source_formats", reader_class, "the reader of a format is a subclass"),
    ("generators", generator_class, "a generator is a subclass")])
def test_what_is_none_is_refused_with_its_package(group: str, find: Callable[[str], object], what: str,
                                                  install: Callable[..., None]) -> None:
    install(f"[megatron_sov.{group}]\nodd = json:dumps\n")
    with pytest.raises(UserError, match=f"'odd' of package tiny-lab 1.2: json:dumps: is .*; {what}"):
        find("odd")
    assert json.dumps({}) == "{}"


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
    assert f"needs {library}, which is not installed; {how_to_install('data')}" in said
    assert not (pages / "out").exists()


def test_what_formats_need_is_here() -> None:
    assert all(require(name, *libraries) == [] for name, libraries in LIBRARIES.items())
    assert require("it", "json", "no_such_one", "nor_this") == [
        f"it needs no_such_one and nor_this, which are not installed; {how_to_install('data')}"]


def test_a_format_tells_its_own_libraries_alone(pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "warcio", None)
    assert problems_of(SourceSettings("s", ("pages",), pages, "html")) == []
    assert "format warc needs warcio" in str(SourceSettings("s", ("pages",), pages, "warc").problems()[0])
