"""Reading the pickles of a checkpoint in a process of its own, with limits of memory and time.

Nothing in it imports or calls what a pickle names (`inert`); the process is there for what a file could do to
the reader: eat memory, or never end.  What it answers is JSON.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_sov.convert.torch_dist.index import read_index
from megatron_sov.convert.torch_dist.stated import read_settings
from megatron_sov.errors import UserError
from megatron_sov.obs.figures import size
from megatron_sov.work.sandbox.restrictions import limit

READERS = {"index": read_index, "settings": read_settings}
MAX_FILE_BYTES = 1 << 30
BASE_MEMORY_BYTES, MEMORY_PER_BYTE = 1 << 29, 60
"""A value of one byte in a pickle is an object of some 50 bytes in memory."""
BASE_TIME_S, BYTES_PER_S = 60, 200_000
"""Processor time that is left to it: some ten times what it takes."""
CLOCK_FACTOR = 20
"""Times on the clock for the processor time, against a hang alone: processes share a machine."""
_CODE = ("import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
         "from megatron_sov.convert.torch_dist.apart import main; main(sys.argv[1])")
_REMEDY = "restore the checkpoint from its source"


def read_apart(what: str, path: Path) -> dict[str, Any]:
    """Return what a file of a checkpoint says.

    Args:
        what: name in `READERS`.
        path: the file.

    Raises:
        UserError: it holds what it should not, is too large, or the process was ended for what it took.
    """
    try:
        size_bytes = path.stat().st_size
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); {_REMEDY}") from None
    if not path.is_file() or size_bytes > MAX_FILE_BYTES:
        raise UserError(f"{path}: has {size(size_bytes)}, and at most {size(MAX_FILE_BYTES)} are read; "
                        f"{_REMEDY}")
    time_s = BASE_TIME_S + size_bytes // BYTES_PER_S
    order = json.dumps({"what": what, "path": str(path.absolute()), "size_bytes": size_bytes,
                        "memory_bytes": BASE_MEMORY_BYTES + MEMORY_PER_BYTE * size_bytes, "time_s": time_s})
    paths = json.dumps([os.path.abspath(entry) for entry in sys.path if entry])
    try:
        done = subprocess.run([sys.executable, "-P", "-c", _CODE, order, paths], stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=CLOCK_FACTOR * time_s, check=False, cwd="/",
                              env={"PATH": os.defpath, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"})
        answer = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        answer = {"error": "it takes more memory or time than a file of its size can need"}
    if "error" in answer:
        raise UserError(f"{path}: is not read, for {answer['error']}; {_REMEDY}")
    return dict(answer["found"])


def main(order: str) -> None:
    """Read one file, in the process that has been started for it."""
    asked = json.loads(order)
    limit(resource.RLIMIT_AS, asked["memory_bytes"])
    limit(resource.RLIMIT_CPU, asked["time_s"])
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_CORE, 0)
    try:
        with open(asked["path"], "rb") as f:
            raw = f.read(asked["size_bytes"])
        # as a whole, in this memory: one text that is named again and again would fill that of the reader
        answer = json.dumps({"found": READERS[asked["what"]](raw)})
    except MemoryError:
        answer = json.dumps({"error": "it takes more memory than a file of its size can need"})
    except (ValueError, OSError, RecursionError) as e:
        answer = json.dumps({"error": str(e)[:500]})
    sys.stdout.write(answer)
    sys.stdout.flush()
    # values nested a million deep would be taken apart one inside another
    os._exit(0)
