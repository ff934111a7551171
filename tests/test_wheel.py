"""The wheel contains every file of our packages, and its commands work without the sources."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_sov import recipes

ROOT = Path(__file__).parents[1]
COMMANDS = ("megatron-sov", "sov-tokenizer", "sov-data", "layout-proof")


def run_installed(installed: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in another folder, with only the installed wheel in front of the import path."""
    return subprocess.run(command, cwd=installed.parent, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": str(installed)})


def test_the_wheel_contains_exactly_the_packaged_files(wheel: Path, packaged_files: set[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(n for n in archive.namelist()
                                     if n.endswith(".dist-info/METADATA"))).decode()
    assert inside == packaged_files
    assert "Name: megatron-sov" in metadata
    assert "License: Apache-2.0" in metadata
    assert "License-File: LICENSE" in metadata


@pytest.mark.each("command", COMMANDS)
def test_the_commands_run_elsewhere(installed: Path, command: str) -> None:
    result = run_installed(installed, sys.executable, str(installed / "bin" / command), "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert command in result.stdout


@pytest.mark.deep
def test_ready_scripts_are_written_from_the_wheel(installed: Path) -> None:
    result = run_installed(installed, sys.executable, str(installed / "bin/megatron-sov"), "submit", "chain",
                           "tiny-solar-open", "--scripts", "scripts")
    assert (result.returncode, result.stderr) == (0, "")
    written = sorted(p.name for p in (installed.parent / "scripts").iterdir())
    assert written == sorted(p.name for p in (ROOT / "slurm/scripts/tiny-solar-open").iterdir())
    assert "export WORK=/a/folder" in (installed.parent / "scripts" / written[0]).read_text()


def test_commands_run_from_the_wheel(installed: Path) -> None:
    program = (
        "import importlib.resources as r, megatron_sov.model.recipes as m, megatron_sov.base.pages as p\n"
        "print(m.__file__, r.files(p).joinpath('templates/page.html.j2').is_file(), m.names()[0])"
    )
    result = run_installed(installed, sys.executable, "-c", program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(installed / "megatron_sov/model/recipes/__init__.py"), "True",
                                     recipes.names()[0]]
