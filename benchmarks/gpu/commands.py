"""Run several of our commands one after another in one process, for parts that start many runs.

Usage: python benchmarks/gpu/commands.py [--double] LIST     LIST: JSON, [[program, word, ...], ...]

The exit code of each command is written to standard output as one line; output of the commands goes to
standard error. The process ends after the first failure, because later commands might find a corrupt CUDA
context.
"""

import importlib
import json
import os
import socket
import sys
import traceback
from typing import TextIO

from setting import DOUBLE, PROGRAMS, ROOT

ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1"}
"""What a launcher sets: a command that trains is then a rank itself, and starts no process."""


def install_double() -> None:
    """Replace Transformer Engine by the double of the tests, with quantized matrix products. Models then use
    its modules in every dtype and for every `train.fp8`. Call this before megatron-core is imported."""
    sys.path[:0] = [str(DOUBLE), str(ROOT)]
    import transformer_engine.pytorch as te  # megatron_sov hides it on a CPU unless it is already imported

    from megatron_sov.engine.model import specs

    specs.on_gpu = lambda: True  # build the `TransformerConfig` of a GPU
    specs.needs_transformer_engine = lambda dtype: True
    from megatron_sov.engine.parallel.gpu_libraries import FP8_FUNCTIONS
    from tests.te_double.quantized_run import quantize_products

    quantize_products()
    for name in FP8_FUNCTIONS.values():  # report every FP8 recipe as available
        setattr(te, name, lambda return_reason=False: (True, "") if return_reason else True)


def run(program: str, words: list[str]) -> int:
    """Run a command in this process with its own `sys.argv` and rank variables; return its exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # a free port, because several parts may run at the same time
        port = str(free.getsockname()[1])
    for name, value in {**ONE_RANK, "MASTER_PORT": port}.items():
        if program == "megatron-sov":
            os.environ[name] = value
        else:
            os.environ.pop(name, None)
    sys.argv = [program, *words]
    try:
        return int(importlib.import_module(PROGRAMS[program]).main() or 0)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:  # report any error as a failure of this command
        traceback.print_exc()
        return 1


def run_all(commands: list[list[str]], answers: TextIO) -> None:
    """Run commands until one fails, and write the exit code of each as a line."""
    for program, *words in commands:
        code = run(program, words)
        print(code, file=answers, flush=True)
        if code:
            return


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if "--double" in sys.argv:
        install_double()
    sys.path.append(str(ROOT))
    run_all(json.loads(sys.argv[-1]), answers)
