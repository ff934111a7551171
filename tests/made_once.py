"""Run a command, such as several pytest processes, with shared warm workers and shared generated data.

    python tests/made_once.py COMMAND ARGUMENT ...          its exit code is the command's

The fixtures `ranks` and `run_command` use the workers (conftest.py), other fixtures the data (packing.py).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any


def main(command: list[str]) -> int:
    """Run the command, generate data while it starts, and return its exit code."""
    from tests.conftest import NO_RANK, SHARED, Worker, shared_workers
    from tests.packing import MAKERS

    with (tempfile.TemporaryDirectory() as data, shared_workers() as addresses,
          tempfile.TemporaryDirectory() as outputs,
          closing(Worker(Path(outputs), addresses["worker"])) as worker):
        environment = {**os.environ, SHARED: json.dumps(addresses), "SOV_TESTS_DATA": data}
        with subprocess.Popen(command, env=environment) as process:
            try:
                _make_data(Path(data), MAKERS, lambda *argv, program: worker.run(
                    600, None, NO_RANK, program=program, argv=argv))
            except BaseException:
                process.kill()
                raise
        return process.returncode


def _make_data(target: Path, makers: dict[str, Callable[..., None]], run: Callable[..., Any]) -> None:
    """Generate each folder under a temporary name, and rename it when complete; tests wait for its name."""
    for name, make in makers.items():
        folder = target / f"unfinished-{name}"
        folder.mkdir()
        make(folder, run)
        folder.rename(target / name)


if __name__ == "__main__":
    # import `tests` from the repository; this folder has subfolders with the names of our packages
    sys.path[0] = str(Path(__file__).parents[1])
    sys.exit(main(sys.argv[1:]))
