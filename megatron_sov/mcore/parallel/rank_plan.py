"""What a rank that is a new process is to do: its launcher writes it into a file, and the rank reads it.

The file has no name and is open in the launcher and its ranks alone: nobody else can have written what is
unpickled here.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import numpy as np
import torch

from megatron_sov import models
from megatron_sov.mcore.parallel import cpu_shims
from megatron_sov.plugins.loading import files_that_ran, run_files


@contextlib.contextmanager
def plan_file(work: Callable[[], Any], num_threads: int) -> Iterator[int]:
    """Give a file, by its descriptor, from which any number of new processes can read their work.

    Args:
        work: runs one rank, with all that it refers to; of the modules that it needs the names alone are
            written, and of users' own files their paths and hashes.
        num_threads: CPU threads of each rank.
    """
    with tempfile.TemporaryFile() as file:
        # what the rest is found by goes first
        pickle.dump((num_threads, files_that_ran(), models.OWN.named()), file)
        _Pickler(file).dump(work)
        file.flush()
        yield file.fileno()


class _Pickler(cloudpickle.Pickler):
    """Refuses an array that is a map of a file, of which each rank would hold a copy in memory."""

    def reducer_override(self, obj: Any) -> Any:
        held = obj
        while isinstance(held, (np.ndarray, memoryview)):
            held = held.base if isinstance(held, np.ndarray) else held.obj
        if isinstance(held, mmap.mmap):
            raise TypeError("an array is a map of a file: what holds it must say, in __reduce__, "
                            "how it is opened again")
        return super().reducer_override(obj)


def read_plan(descriptor: int) -> Callable[[], Any]:
    """Return the work of a plan, and prepare this process for it.

    Raises:
        UserError: a user's file fails, or is not what it was.
    """
    # all ranks share the place in the file, so none may move it
    file = io.BytesIO(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    os.close(descriptor)
    num_threads, files, families = pickle.load(file)  # noqa: S301
    torch.set_num_threads(num_threads)
    cpu_shims.prepare_megatron()
    run_files(files)
    for reference in families:
        models.OWN.load(reference)
    work: Callable[[], Any] = pickle.load(file)  # noqa: S301
    return work
