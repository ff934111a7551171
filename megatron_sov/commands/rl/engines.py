"""`megatron-sov rl engines RECIPE ... --port N`: the servers of a run whose trainer is on other machines."""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from annotated_types import Ge, Le

from megatron_sov.base.errors import ExitCode, UserError, warn
from megatron_sov.base.settings import Flag, build_command, read_options
from megatron_sov.commands.rl.asked import longest_of
from megatron_sov.commands.rl.rounds import RlRunOptions
from megatron_sov.infer.engine import ENGINE_SET, MEGATRON
from megatron_sov.model.pretrained import CONFIG, is_hf_folder

LOOK_S = 1.0
REST_S = 10.0
"""Before a server is started again: who asks it sees meanwhile that it was gone, and gives it its weights
anew."""


@dataclass(frozen=True, kw_only=True)
class RlEnginesOptions(RlRunOptions):
    """Keep the servers of an `rl run` on this machine; takes the words of the run, which asks them at its
    --engine-url."""

    port: Annotated[int, Ge(1), Le(65535), Flag(value="N")] = 8000
    """Of the first server; further ones have the next ports."""


class KeptServer(Protocol):
    """A server that can be started, and started again."""

    log: Path

    def start(self, should_stop: Callable[[], bool]) -> Any:
        """Return once it answers, or None where it was asked to stop."""
        ...

    def is_alive(self) -> bool: ...

    def end(self) -> None: ...


def keep(server: KeptServer, name: str, restarts: int, is_over: threading.Event, *, look_s: float = LOOK_S,
         rest_s: float = REST_S) -> str:
    """Keep a server at work until `is_over`; returns why it cannot be, or "".

    Args:
        server: not started yet.
        name: where it answers, for sentences.
        restarts: starts in a row that may fail.
        is_over: ends it.
        look_s: between two looks at it.
        rest_s: before it is started again.
    """
    num_failures = 0
    try:
        while not is_over.is_set():
            try:
                found = server.start(is_over.is_set)
            except UserError as e:
                num_failures += 1
                if num_failures > restarts:
                    return str(e)
                warn(f"{e}; it is started again")
                is_over.wait(rest_s)
                continue
            if found is None:
                break
            num_failures = 0
            print(f"{name} answers", flush=True)
            while server.is_alive() and not is_over.wait(look_s):
                pass
            if not is_over.is_set():
                warn(f"{name}: its server has ended (see {server.log}), and is started again")
                is_over.wait(rest_s)
        return ""
    finally:
        server.end()


def run_engines(args: argparse.Namespace) -> int:
    """Keep the servers until this command is asked to end.

    Raises:
        UserError: a mistake in the arguments, or a server cannot be started.
    """
    options = read_options(RlEnginesOptions, args)
    if options.engine == MEGATRON:
        raise UserError(f"--engine {options.engine}: has no servers; add --engine vllm, as the run has it")
    from megatron_sov.commands.train.setup.data_defaults import complete_stage
    from megatron_sov.commands.train.setup.starts import request_with_model
    from megatron_sov.infer.engines.server_engine import parse_server_settings
    from megatron_sov.infer.engines.server_process import ServerProcess, check_engine_program

    check_engine_program(options.engine, (), options.engine_python)
    asked = request_with_model(options, options.start_from, "policy")
    config = complete_stage(asked, asked.config(), "policy", None, 0).config
    settings = parse_server_settings(options.engine, options.engine_set, ENGINE_SET)
    places, host = options.places(options.run), socket.gethostname()
    is_over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: is_over.set())
    model = _model(options, is_over)
    failures: list[str] = []

    def work(server: ServerProcess) -> None:
        if why := keep(server, f"{host}:{server.port}", settings.restarts, is_over):
            failures.append(why)
            is_over.set()

    threads = [threading.Thread(target=work, args=[ServerProcess(
        options.engine, number, model, longest_of(config.rollout, None), settings, places.logs / host,
        with_routes=config.policy.router_replay, python=places.python, port=options.port + number)])
        for number in range(settings.servers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise UserError(failures[0])
    return ExitCode.OK


def _model(options: RlEnginesOptions, is_over: threading.Event) -> Path:
    """Return the folder that servers load, which the run makes of a checkpoint."""
    if is_hf_folder(options.start_from):
        return options.start_from
    model = options.run / "engines" / "model"
    if not (model / CONFIG).is_file():
        print(f"waits for the run to make {model}", file=sys.stderr, flush=True)
    while not (model / CONFIG).is_file() and not is_over.wait(LOOK_S):
        pass
    return model


ENGINES = build_command(RlEnginesOptions, run_engines)
