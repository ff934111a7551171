"""Download sources of other projects that tests read, and look up newer releases of megatron-core.

Usage: python tests/releases.py    (as `make test`): says so where the lock is old, without asking an index
"""

import datetime
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build/releases"
LOCK = ROOT / "constraints.txt"
LIBRARY = "megatron-core"
OLD_DAYS = 45
"""Age of the lock after which a newer megatron-core is likely: one comes every six to ten weeks."""


def is_source(member: str) -> bool:
    return member.endswith((".py", "METADATA"))


def fetch_wheel(name: str, version: str, python: str = "3.12",
                keeps: Callable[[str], bool] = is_source) -> Path:
    """Return a folder with a part of a wheel, downloaded once.

    Args:
        name: name of the package.
        version: version of the package.
        python: Python version of the wheel.
        keeps: selects files of the wheel by path; default: Python sources.

    Raises:
        OSError: pip cannot fetch it.
    """
    folder = FOLDER / f"{name}-{version}"
    if folder.exists():
        return folder
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as work:
        completed = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--python-version", python, "--only-binary=:all:", "--retries", "2", "--dest", work,
             f"{name}=={version}"],
            capture_output=True, text=True, check=False)
        wheels = list(Path(work).glob("*.whl"))
        if not wheels:
            raise OSError(f"pip cannot fetch {name} {version}: {completed.stderr.strip()[-300:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(Path(work) / "sources", filter(keeps, wheel.namelist()))
        try:
            (Path(work) / "sources").rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return folder


def locked_version() -> str:
    """Return the version of megatron-core in the lock."""
    match = re.search(rf"^{LIBRARY}==(\S+)$", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    assert match, f"{LOCK.name} has no line {LIBRARY}==VERSION"
    return match[1]


def newest_version() -> str:
    """Return the newest version of megatron-core that the index has for Python 3.12; "": no index answers."""
    try:
        listed = subprocess.run(
            [sys.executable, "-m", "pip", "index", "versions", LIBRARY, "--python-version", "3.12",
             "--retries", "0", "--timeout", "5", "--only-binary=:all:", "--disable-pip-version-check"],
            capture_output=True, text=True, timeout=60, check=False).stdout
    except subprocess.TimeoutExpired:
        return ""
    result = re.match(rf"{LIBRARY} \(([^)]+)\)", listed)
    return result[1] if result else ""


def is_newer(version: str, pinned: str) -> bool:
    """Compare two versions by their numbers."""
    numbers = [[int(part) for part in re.findall(r"\d+", text)] for text in (version, pinned)]
    return numbers[0] > numbers[1]


def environment(folder: Path) -> dict[str, str]:
    """Return variables under which child processes import the packages in a folder first."""
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def age_note(today: datetime.date) -> str:
    """Return a sentence if the lock is older than OLD_DAYS; "": it is not."""
    match = re.search(r"^# Locked on (\d{4}-\d\d-\d\d)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    assert match, f"{LOCK.name} has no line '# Locked on YYYY-MM-DD'"
    days = (today - datetime.date.fromisoformat(match[1])).days
    if days <= OLD_DAYS:
        return ""
    return (f"note: {LOCK.name} has {LIBRARY} {locked_version()} and is {days} days old, so a newer release "
            "is likely: `make deep` runs the engine's tests on it")


if __name__ == "__main__":
    if note := age_note(datetime.date.today()):
        print(note)
