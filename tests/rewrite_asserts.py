"""Rewrite the asserts of all test files once into pytest's cache: otherwise each pytest process repeats it,
which takes a third of the collection time.

Run before pytest; the files lie in the folders `__pycache__`, and pytest leaves out those whose test has
changed since.
"""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from _pytest.assertion import AssertionState, rewrite
from _pytest.config import Config, get_config

TESTS = Path(__file__).parent


def settings() -> Config:
    """Return pytest's settings of the project."""
    config = get_config(["--rootdir", str(TESTS.parent)])
    config.parse(["-p", "no:cacheprovider", str(TESTS / Path(__file__).name)])
    return config


def keep(files: list[Path]) -> None:
    """Rewrite each of these files that has not been."""
    config = settings()
    state = AssertionState(config, "rewrite")
    for file in files:
        kept = rewrite.get_cache_dir(file) / f"{file.stem}{rewrite.PYC_TAIL}"
        if rewrite.try_makedirs(kept.parent) and rewrite._read_pyc(file, kept) is None:
            stat, code = rewrite._rewrite_test(file, config)
            rewrite._write_pyc(state, code, stat, kept)


if __name__ == "__main__":
    found = sorted({*TESTS.rglob("test_*.py"), *TESTS.rglob("conftest.py")})
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(keep, [found[::2], found[1::2]]))
