"""Runs a command whose processes of tests share what each would else make anew: the workers
behind `ranks` and `run_command`, which import all libraries, and the data of `token_shards` and
`packed_data`.

    python tests/made_once.py COMMAND ARGUMENT ...          its exit code is the command's
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path


def main(command: list[str]) -> int:
    """Return the exit code of a command that finds workers and data in its environment."""
    from tests.conftest import NO_RANK, SHARED, Worker, shared_workers
    from tests.packing import MAKERS

    with (tempfile.TemporaryDirectory() as made, shared_workers() as shared,
          tempfile.TemporaryDirectory() as said, closing(Worker(Path(said), shared["worker"])) as worker):
        for name, make in MAKERS.items():
            (folder := Path(made) / name).mkdir()
            make(folder, lambda *argv, program: worker.run(600, None, NO_RANK, program=program, argv=argv))
        return subprocess.run(command, check=False, env={
            **os.environ, SHARED: json.dumps(shared), "SOV_TESTS_DATA": made}).returncode


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # not this folder: what mirrors a package in it has its name
    sys.exit(main(sys.argv[1:]))
