"""Runs functions of a test file on several ranks, in a process of its own:
the worker behind the `ranks` fixture.

Usage: rank_main.py JOBS.json; what jobs need is imported once, then each job's ranks are forked.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sov.mcore.parallel import world


def _function(file: str, name: str) -> Any:
    spec = importlib.util.spec_from_file_location("ranked", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["ranked"] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def main(jobs_file: Path) -> int:
    """Run every job; each rank writes its result as JSON beside the jobs file."""
    jobs = json.loads(jobs_file.read_text())
    for number, job in enumerate(jobs):
        function = _function(job["file"], job["function"])  # here: in each rank it would be imported again

        def rank(number: int = number, job: dict[str, Any] = job,
                 function: Callable[..., Any] = function) -> int:
            result = function(**job["arguments"])
            (jobs_file.parent / f"{number}-{os.environ['RANK']}.json").write_text(json.dumps(result))
            return 0

        code = world.launch(rank, job["nproc"], num_threads=1)
        if code:
            return code
    return 0


if __name__ == "__main__":
    from megatron_sov.mcore.parallel import cpu_shims

    cpu_shims.prepare_megatron()
    sys.exit(main(Path(sys.argv[1])))
