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


def parse_pytest_config() -> Config:
    """Return pytest's configuration of this project."""
    config = get_config(["--rootdir", str(TESTS.parent)])
    config.parse(["-p", "no:cacheprovider", str(TESTS / Path(__file__).name)])
    return config


def rewrite_files(files: list[Path]) -> None:
    """Rewrite the asserts of each file without an up-to-date cache entry."""
    config = parse_pytest_config()
    state = AssertionState(config, "rewrite")
    for file in files:
        cached = rewrite.get_cache_dir(file) / f"{file.stem}{rewrite.PYC_TAIL}"
        if rewrite.try_makedirs(cached.parent) and rewrite._read_pyc(file, cached) is None:
            stat, code = rewrite._rewrite_test(file, config)
            rewrite._write_pyc(state, code, stat, cached)


if __name__ == "__main__":
    test_files = sorted({*TESTS.rglob("test_*.py"), *TESTS.rglob("conftest.py")})
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(rewrite_files, [test_files[::2], test_files[1::2]]))
