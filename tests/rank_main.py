"""Run work in forks of a process that has imported Megatron-Core: the worker of the fixtures `ranks` and
`run_command`.

It serves all processes of pytest, each of which calls at a socket.  Each line of a caller asks for jobs
(functions of a test file, on several ranks), for a command, or for a function that nobody waits for.  It is
done in a fork, as fresh as this process, and a line back holds the exit code and the processor seconds of
the fork.  The worker ends with its standard input, and all forks end with it; those of a caller end with the
caller.

The first argument is the number of the listening socket, the second a folder that stands first on the path:
a double of Transformer Engine, with which models are configured as on a GPU and made of its modules, in any
dtype; or another version of megatron-core.
"""

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import pkgutil
import resource
import runpy
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sov import recipes
from megatron_sov.base.command_line import Parser
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import apply_settings, layout_settings
from megatron_sov.version import OUR_PACKAGES
from megatron_sov.work.processes.children import die_with_parent
from megatron_sov.work.processes.process_tree import ProcessTreeUsage, WorkingTime

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # files of jobs import modules that tests share

PROGRAMS = {"megatron-sov": "megatron_sov.cli", "sov-data": "data_prep.cli", "sov-tokenizer": "tokenizer.cli"}
"""Program -> its module; the part with the module may not be installed."""


def import_everything() -> None:
    """Import everything that commands and ranks import lazily, once for all forks."""
    for package in OUR_PACKAGES:
        for found in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            # layout_proof.proof replaces the layers of Transformer Engine
            if not found.name.endswith(("__main__", "layout_proof.proof")):
                try:
                    importlib.import_module(found.name)
                except ImportError as e:  # a library that some module needs may not be installed
                    if (e.name or "").partition(".")[0] in OUR_PACKAGES:
                        raise
    import pandas  # noqa: F401  (which pyarrow imports where it looks at an array that is one of pandas')
    from numba.core.registry import cpu_target
    from pyarrow import acero  # noqa: F401  (a sum over a table needs it)
    from transformers import (  # noqa: F401  (which imports a name's module when it is asked for)
        AutoModelForCausalLM, AutoTokenizer, ExaoneMoeForCausalLM, PreTrainedTokenizerFast,
        SolarOpenForCausalLM)

    for context in (cpu_target.typing_context, cpu_target.target_context):
        context.refresh()  # a compiled function, kept or not, needs all that numba knows


def make_what_is_kept() -> None:
    """Fill the caches of the settings reader, which take a fifth of the time of a rank in a small test."""
    config = recipes.get("tiny-k-exaone")
    apply_settings(config, [*layout_settings(config), "data.phases.0.seq_len=32", "model.num_layers=4",
                            "optim.name=adamw", "objective.name=lm", "guards.window_steps=20",
                            'model.yarn={"factor": 4.0, "original_max_position_tokens": 16}'])
    for module in PROGRAMS.values():
        with contextlib.suppress(ImportError, UserError):  # a part that is not installed
            for command in importlib.import_module(module).COMMANDS.values():
                command.load().add_arguments(Parser())  # the help under each setting is read from its source


def _function(file: str, name: str) -> Any:
    spec = importlib.util.spec_from_file_location("ranked", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["ranked"] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def run_jobs(jobs_file: Path) -> int:
    """Run every job; each rank leaves its world and writes its result as JSON next to the jobs file."""
    # not before `warm` has put doubles on the path: the engine imports megatron, and hides Transformer Engine
    from megatron_sov.engine.parallel import launcher, world

    jobs = json.loads(jobs_file.read_text())
    for number, job in enumerate(jobs):
        function = _function(job["file"], job["function"])  # here: in each rank it would be imported again

        def rank(number: int = number, job: dict[str, Any] = job,
                 function: Callable[..., Any] = function) -> None:
            result = function(**job["arguments"])
            world.leave_world()
            (jobs_file.parent / f"{number}-{os.environ['RANK']}.json").write_text(json.dumps(result))

        code = launcher.launch_ranks(rank, job["nproc"], num_threads=1)
        if code:
            return code
    return 0


def run_command(program: str, argv: list[str]) -> int:
    """Run `PROGRAM ARGV` as its own process would, and `python FILE ARGV`, too."""
    sys.argv = [program, *argv]
    try:
        if program == "python":
            sys.argv, sys.path[:0] = argv, [str(Path(argv[0]).parent)]
            runpy.run_path(argv[0], run_name="__main__")
            return 0
        return int(importlib.import_module(PROGRAMS[program]).main())
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)


def be_fresh(asked: dict[str, Any], parent: int) -> None:
    """Let this fork have environment, folder, files and limits of its own."""
    os.setpgid(0, 0)  # the leader of all that it starts
    die_with_parent(parent)
    said = [os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            for name in ("out", "err")]
    for target, fd in enumerate((os.open(os.devnull, os.O_RDONLY), *said)):
        os.dup2(fd, target)
    os.chdir(asked["folder"])
    # else each process of a command's Workers would import this file, and torch with it: 2.4 s of a core
    vars(sys.modules["__main__"]).pop("__file__", None)
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.executable = os.environ.get("SOV_TESTS_PYTHON", sys.executable)  # that commands start others by
    if asked["file_limit_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_limit_bytes"],) * 2)


def fork(asked: dict[str, Any]) -> int:
    """Start a request in a fork, and return the process id."""
    parent, child = os.getpid(), os.fork()
    if child:
        return child
    code = 1
    try:
        be_fresh(asked, parent)
        code = (run_command(asked["program"], asked["argv"]) if "argv" in asked
                else _function(*asked["stays"])(*asked["arguments"]) if "stays" in asked
                else run_jobs(Path(asked["jobs"])))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(child: int, timeout_s: float) -> tuple[int, float]:
    """Return a child's exit code, and the processor seconds of the child and its processes.  A child that
    runs longer than `timeout_s`, not counting the time in which it waits for a processor, is killed with all
    its processes."""
    watch = ProcessTreeUsage(child)
    own = WorkingTime(watch.totals, 0.5)
    try:
        while True:
            ended, status, used = os.wait4(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
            if (now_s := time.monotonic()) >= own.look_at_s:
                own.look(now_s)
                if own.working_s(now_s) > timeout_s:
                    os.killpg(child, signal.SIGKILL)
            time.sleep(0.005)
    finally:
        watch.close()


def warm(doubles: list[str]) -> None:
    """Import modules that forks will need."""
    gc.disable()  # imported modules are never collected
    import pytest  # noqa: F401  (files of jobs import it)

    sys.path[:0] = doubles
    of_te = any(Path(folder, "transformer_engine").exists() for folder in doubles)
    if of_te:
        import transformer_engine.pytorch  # noqa: F401  (one that is not imported is hidden on a CPU)
    from megatron_sov.engine.model import specs
    from megatron_sov.train.objectives import data_objective  # noqa: F401  (ranks need it)
    from megatron_sov.train.stages import stage  # noqa: F401  (ranks need it)

    if of_te:
        specs.on_gpu = lambda: True
        specs.needs_transformer_engine = lambda dtype: True
        from megatron_sov.engine.parallel.storage_extension import load_storage_extension
        load_storage_extension(["layernorm"])  # compiles 27 s, once per home folder
    elif not doubles:
        import_everything()
    make_what_is_kept()
    gc.collect()
    gc.freeze()  # forks neither collect the modules that exist here nor copy their pages
    gc.set_threshold(10_000, 10, 10)  # garbage collection took a tenth of a small step
    gc.enable()


def answer(caller: socket.socket) -> None:
    """Do all that a caller asks for; its lines stand for standard input and output."""
    for fd in (0, 1):
        os.dup2(caller.fileno(), fd)
    caller.close()
    for line in sys.stdin:
        order = json.loads(line)
        child = fork(order)
        code, used_s = (0, 0.0) if "stays" in order else wait_for(child, order["timeout_s"])
        print(code, used_s, flush=True)


def serve(door: socket.socket, doubles: list[str]) -> None:
    """Answer each caller in a fork of its own, until standard input ends; the first waits for the imports."""
    is_warm = False
    while sys.stdin not in select.select([door, sys.stdin], [], [])[0]:
        caller, _ = door.accept()
        if not is_warm:
            warm(doubles)
            is_warm = True
        server = os.getpid()
        if not os.fork():
            try:
                die_with_parent(server)
                door.close()
                answer(caller)
            finally:
                os._exit(0)
        caller.close()


if __name__ == "__main__":
    serve(socket.socket(socket.AF_UNIX, fileno=int(sys.argv[1])), sys.argv[2:])
