"""Run a command whose test processes share warm workers (`ranks`, `run_command`) and generated data
(packing.py).

    python tests/made_once.py COMMAND ARGUMENT ...          its exit code is the command's
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
    """Return the exit code of a command that finds workers and data in its environment.  The data are made
    while the command starts."""
    from tests.conftest import NO_RANK, SHARED, Worker, shared_workers
    from tests.packing import MAKERS

    with (tempfile.TemporaryDirectory() as made, shared_workers() as shared,
          tempfile.TemporaryDirectory() as said, closing(Worker(Path(said), shared["worker"])) as worker):
        environment = {**os.environ, SHARED: json.dumps(shared), "SOV_TESTS_DATA": made}
        with subprocess.Popen(command, env=environment) as process:
            try:
                _make_data(Path(made), MAKERS, lambda *argv, program: worker.run(
                    600, None, NO_RANK, program=program, argv=argv))
            except BaseException:
                process.kill()
                raise
        return process.returncode


def _make_data(made: Path, makers: dict[str, Callable[..., None]], run: Callable[..., Any]) -> None:
    """Create each data folder under a temporary name, and rename it when complete, because tests wait for the
    name."""
    for name, make in makers.items():
        (folder := made / f"unfinished-{name}").mkdir()
        make(folder, run)
        folder.rename(made / name)


if __name__ == "__main__":
    # not this folder: its sub-folders have the names of packages
    sys.path[0] = str(Path(__file__).parents[1])
    sys.exit(main(sys.argv[1:]))
