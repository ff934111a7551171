"""The wheel: it holds every file of our packages, and its commands work elsewhere, away from the sources."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.version import PARTS, PARTS_NEEDED, __version__, part_of

ROOT = Path(__file__).parents[1]
COMMANDS = ("megatron-sov", "sov-tokenizer", "sov-data")
NO_CHECKOUT = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in f'{f}']; "
"""Begins a program that finds nothing in the checkout: an editable installation gives what a part lacks."""


def run_installed(installed: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in another folder, with only the installed wheel in front of the import path."""
    return subprocess.run(command, cwd=installed.parent, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": str(installed)})


def test_the_wheel_holds_every_packaged_file_and_nothing_else(wheel: Path, packaged_files: set[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(n for n in archive.namelist()
                                     if n.endswith(".dist-info/METADATA"))).decode()
    assert inside == packaged_files
    assert "Name: megatron-sov" in metadata
    assert "License: Apache-2.0" in metadata
    assert "License-File: LICENSE" in metadata


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run_elsewhere(installed: Path, command: str) -> None:
    done = run_installed(installed, sys.executable, str(installed / "bin" / command), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert command in done.stdout


@pytest.mark.deep
def test_ready_scripts_are_written_from_the_wheel(installed: Path) -> None:
    done = run_installed(installed, sys.executable, str(installed / "bin/megatron-sov"), "submit", "chain",
                         "tiny-solar-open", "--scripts", "scripts")
    assert (done.returncode, done.stderr) == (0, "")
    written = sorted(p.name for p in (installed.parent / "scripts").iterdir())
    assert written == sorted(p.name for p in (ROOT / "slurm/scripts/tiny-solar-open").iterdir())
    assert "export WORK=/a/folder" in (installed.parent / "scripts" / written[0]).read_text()


def test_what_runs_is_the_wheel_with_its_data_files(installed: Path) -> None:
    program = (
        "import importlib.resources as r, megatron_sov.model.recipes as m, megatron_sov.base.pages as p\n"
        "print(m.__file__, r.files(p).joinpath('templates/page.html.j2').is_file(), m.names()[0])"
    )
    done = run_installed(installed, sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed / "megatron_sov/model/recipes/__init__.py"), "True",
                                   recipes.names()[0]]


def parts_in(files: set[str]) -> dict[str, set[str]]:
    """Return part ("" for the core) -> its files, by `part_of`."""
    found: dict[str, set[str]] = {}
    for file in files:
        name = file.removesuffix(".py") if file.endswith(".py") else file.rpartition("/")[0]
        module = name.removesuffix("/__init__").replace("/", ".")
        found.setdefault(part_of(module), set()).add(file)
    return found


@pytest.mark.deep
def test_the_core_works_without_its_parts_and_names_what_is_missing(
        build_wheel: Callable[..., Path], install_wheels: Callable[..., Path],
        packaged_files: set[str]) -> None:
    core, serve = build_wheel("core"), build_wheel("serve")
    parts = parts_in(packaged_files)
    assert set(parts) == {"", *PARTS}
    for built, part in ((core, ""), (serve, "serve")):
        with zipfile.ZipFile(built) as archive:
            assert {name for name in archive.namelist() if ".dist-info/" not in name} == parts[part]
            metadata = archive.read(next(name for name in archive.namelist()
                                         if name.endswith(".dist-info/METADATA"))).decode()
        # pip looks in an index for what a wheel asks for by name, and no index has ours
        own = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: megatron-sov")]
        assert own == ([f"Requires-Dist: megatron-sov=={__version__}"] if part else [])
    alone, both = install_wheels(core), install_wheels(core, serve)
    program = f"{NO_CHECKOUT}from megatron_sov.cli import main; raise SystemExit(main())"
    done = run_installed(alone, sys.executable, "-P", "-c", program, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "(part 'serve', not installed)" in done.stdout and "pretrain" in done.stdout
    done = run_installed(alone, sys.executable, "-P", "-c", program, "serve", "somewhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: this needs the part 'serve', which is not installed: install the "
                                  "wheel megatron_sov_serve-")
    done = run_installed(both, sys.executable, "-P", "-c", program, "serve", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    # an action of a command may be another part's, which may need a third
    done = run_installed(alone, sys.executable, "-P", "-c", program, "eval", "--help")
    assert done.returncode == 0 and "(part 'bench', not installed)" in " ".join(done.stdout.split())
    assert "Loss and bits per byte on held-out documents, per source\n" in done.stdout
    done = run_installed(alone, sys.executable, "-P", "-c", program, "eval", "lm", "somewhere")
    assert (done.returncode, done.stdout) == (2, "")
    wheels = [f"megatron_sov_{name}-{__version__}-py3-none-any.whl" for name in ("bench", "post")]
    assert done.stderr == ("error: this needs the part 'bench', which is not installed: install the wheels "
                           f"{wheels[0]} and {wheels[1]} from where the core came (make parts)\n")


@pytest.mark.deep
def test_sov_data_marks_the_commands_of_missing_parts(build_wheel: Callable[..., Path],
                                                      install_wheels: Callable[..., Path]) -> None:
    data = install_wheels(build_wheel("core"), build_wheel("data"))
    program = f"{NO_CHECKOUT}from data_prep.cli import main; raise SystemExit(main())"
    done = run_installed(data, sys.executable, "-P", "-c", program, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    shown = " ".join(done.stdout.split())
    assert "(part 'curate', not installed)" in shown and "(part 'synth', not installed)" in shown
    assert "turn text, chats, preferences or prompts into token shards adopt" in shown
    done = run_installed(data, sys.executable, "-P", "-c", program, "run", "pipeline.yaml")
    assert (done.returncode, done.stdout) == (2, "") and "needs the part 'curate'" in done.stderr


@pytest.mark.parametrize("part", PARTS)
def test_a_part_asks_for_the_core_and_the_parts_that_it_needs(part: str,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **keywords: asked.update(keywords))
    monkeypatch.setenv("SOV_PART", part)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    own = [line for line in asked["install_requires"] if line.startswith("megatron-sov")]
    assert asked["name"] == f"megatron-sov-{part}" and own == [
        f"megatron-sov=={__version__}", *(f"megatron-sov-{name}=={__version__}"
                                          for name in PARTS_NEEDED.get(part, ()))]
