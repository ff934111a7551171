"""The other of the two versions of megatron-core: the newer one under Python 3.11, which has the older
installed, and the older one from Python 3.12 on.

Its wheel is for another Python, and its sources run under this one: unpacked into a folder that stands first
on the path, they take the place of what is installed, in children too.

Usage: python tests/newest.py FOLDER ...    (as `make newest`): runs these tests on it
       python tests/newest.py --releases    : says which pins an index has newer versions of
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build/newest"
OLDER, NEWER = "python_version < '3.12'", "python_version >= '3.12'"
PYTHONS = {OLDER: "3.11", NEWER: "3.12"}
"""Marker of megatron-core's line in constraints.txt -> a Python that it is for."""


def other(python: tuple[int, ...] = sys.version_info[:2]) -> str:
    """Return the marker of the version that is not installed under a Python."""
    return OLDER if python >= (3, 12) else NEWER


@cache
def lane(marker: str = other()) -> str:
    """Return the version of megatron-core that constraints.txt has behind a marker."""
    return next(line.partition("==")[2].partition(";")[0] for line in
                (ROOT / "constraints.txt").read_text().splitlines()
                if line.startswith("megatron-core==") and line.endswith(marker))


def is_source(member: str) -> bool:
    return member.endswith((".py", "METADATA"))


def fetched(name: str, version: str, python: str = "3.12", keeps: Callable[[str], bool] = is_source) -> Path:
    """Return a folder with a part of a wheel, fetched once.

    Args:
        name: of the package.
        version: of it.
        python: that the wheel is for.
        keeps: whether a file of the wheel, by its path there, is of the part: its Python sources.

    Raises:
        OSError: pip cannot fetch it.
    """
    folder = FOLDER / f"{name}-{version}"
    if folder.exists():
        return folder
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as work:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--python-version", python, "--only-binary=:all:", "--retries", "2", "--dest", work,
             f"{name}=={version}"],
            capture_output=True, text=True, check=False)
        wheels = list(Path(work).glob("*.whl"))
        if not wheels:
            raise OSError(f"pip cannot fetch {name} {version}: {done.stderr.strip()[-300:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(Path(work) / "sources", filter(keeps, wheel.namelist()))
        try:
            (Path(work) / "sources").rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return folder


def unpacked(marker: str = other()) -> Path:
    """Return the folder of a version of megatron-core, see `fetched`."""
    return fetched("megatron-core", lane(marker), PYTHONS[marker])


def is_here() -> bool:
    """Return whether the other version was fetched."""
    return (FOLDER / f"megatron-core-{lane()}").exists()


def environment() -> dict[str, str]:
    """Return variables under which this process's children import the other version."""
    paths = [str(unpacked()), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def newer_release(name: str, pinned: str, python: str) -> str:
    """Return a sentence where an index has a newer version for a Python than is pinned; "": it has not, or
    there is no index."""
    try:
        told = subprocess.run(
            [sys.executable, "-m", "pip", "index", "versions", name, "--python-version", python, "--retries",
             "0", "--timeout", "5", "--only-binary=:all:", "--disable-pip-version-check"],
            capture_output=True, text=True, timeout=60, check=False).stdout
    except subprocess.TimeoutExpired:
        return ""
    found = re.match(rf"{re.escape(name)} \(([^)]+)\)", told)
    if found is None or not _is_newer(found[1], pinned):
        return ""
    return (f"note: {name} {found[1]} is out for Python {python}, and this project is read against {pinned}: "
            "raise the pin, then `make contract` and `make newest` say what differs")


def _is_newer(version: str, pinned: str) -> bool:
    numbers = [[int(part) for part in re.findall(r"\d+", text)] for text in (version, pinned)]
    return numbers[0] > numbers[1]


def releases() -> None:
    """Print a line for each pin that an index has a newer version of; never fail."""
    extra = re.search(r"transformer-engine\[[^]]*\]==([\d.]+)", (ROOT / "setup.py").read_text())
    assert extra is not None
    pins = [("megatron-core", lane(marker), python) for marker, python in PYTHONS.items()]
    for sentence in (newer_release(*pin) for pin in [*pins, ("transformer-engine", extra[1], "3.12")]):
        if sentence:
            print(sentence, flush=True)


def main() -> int:
    """Run tests on the other version, once it was seen that it is what is imported."""
    if sys.argv[1:] == ["--releases"]:
        releases()
        return 0
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c",
         "import megatron_sov.engine.lanes as lanes; print(lanes.VERSION)"],
        env=environment(), capture_output=True, text=True, check=True).stdout.strip()
    if told != lane():
        raise SystemExit(f"megatron-core {told} is imported where {lane()} was wanted")
    print(f"megatron-core {told}, from {unpacked()}", flush=True)
    return subprocess.run([sys.executable, "-m", "pytest", *sys.argv[1:]], env=environment(),
                          check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
