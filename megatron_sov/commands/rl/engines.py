"""Options and checks for `megatron-sov rl engines`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import DeclaredCommand, Flag
from megatron_sov.commands.rl.cycle import RlRunOptions
from megatron_sov.infer.engine import MEGATRON


@dataclass(frozen=True, kw_only=True)
class RlEnginesOptions(RlRunOptions):
    """Keep the servers for an `rl run` on this machine. Takes the arguments of the run, which reaches the
    servers by its --engine-url."""

    port: Annotated[int, Ge(1), Le(65535), Flag(value="N")] = 8000
    """Port of the first server; further servers use the next ports."""


def check_engines(options: RlEnginesOptions) -> RlEnginesOptions:
    if options.engine == MEGATRON:
        raise UserError(f"--engine {options.engine}: has no servers; add --engine vllm, as the run has it")
<<<<<<< HEAD
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
=======
    return options
>>>>>>> main


ENGINES = DeclaredCommand(RlEnginesOptions, check_engines,
                          "megatron_sov.commands.rl.engines_run:keep_servers")
