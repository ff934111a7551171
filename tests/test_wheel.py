"""The wheel: it holds every file of the rooms, and its commands work elsewhere, away from the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_sov.version import OUR_PACKAGES

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[1]
COMMANDS = ("megatron-sov", "sov-tokenizer", "sov-data")


def pip(*arguments: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--no-input", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def files_of_the_rooms() -> set[str]:
    """Return every file below the packages, leaving out what Python and editors put there."""
    return {p.relative_to(ROOT).as_posix() for package in OUR_PACKAGES for p in (ROOT / package).rglob("*")
            if p.is_file() and "__pycache__" not in p.parts and not p.name.startswith(".")}


@pytest.fixture(scope="module")
def wheel(files_of_the_rooms: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, so that nothing is written beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in files_of_the_rooms | {"setup.py", "pyproject.toml", "README.md", "LICENSE"}:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), ".", cwd=folder / "source")
    (built,) = folder.glob("megatron_sov-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone into a folder; its dependencies come from the running environment."""
    target = tmp_path_factory.mktemp("elsewhere") / "site"
    pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=target.parent)
    return target


def run_installed(installed: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in another folder, with only the installed wheel in front of the import path."""
    return subprocess.run(command, cwd=installed.parent, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(installed)})


def test_the_wheel_holds_every_file_of_the_rooms_and_nothing_else(wheel: Path, files_of_the_rooms: set[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    assert inside == files_of_the_rooms
    assert "Name: megatron-sov" in metadata
    assert "License: Apache-2.0" in metadata
    assert "License-File: LICENSE" in metadata


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run_elsewhere(installed: Path, command: str) -> None:
    done = run_installed(installed, sys.executable, str(installed / "bin" / command), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert command in done.stdout


def test_ready_scripts_are_written_from_the_wheel(installed: Path) -> None:
    done = run_installed(installed, sys.executable, str(installed / "bin/megatron-sov"), "submit", "chain", "tiny-solar-open",
                         "--scripts", "scripts")
    assert (done.returncode, done.stderr) == (0, "")
    written = sorted(p.name for p in (installed.parent / "scripts").iterdir())
    assert written == sorted(p.name for p in (ROOT / "slurm/scripts/tiny-solar-open").iterdir())
    assert "export WORK=/a/folder" in (installed.parent / "scripts" / written[0]).read_text()


def test_what_runs_is_the_wheel_with_its_data_files(installed: Path) -> None:
    program = (
        "import importlib.resources as r, megatron_sov.recipes as m, megatron_sov.pages as p\n"
        "print(m.__file__, r.files(p).joinpath('templates/page.html.j2').is_file(), m.names()[0])"
    )
    done = run_installed(installed, sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed / "megatron_sov/recipes/__init__.py"), "True", "k-exaone-236b"]
