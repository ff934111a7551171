"""Steps of pipelines, formats of sources and generators that an installed package declares."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep import cli
from data_prep.curate.pipeline.step import step_class, step_names
from data_prep.curate.sources.formats import format_problems, reader_class
from data_prep.synth.known import generator_class, generator_names
from megatron_sov.base.errors import UserError

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
