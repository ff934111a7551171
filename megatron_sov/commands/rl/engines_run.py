"""Runs `megatron-sov rl engines`: engine servers for a run whose trainer is on other machines."""

import signal
import socket
import sys
import threading
from pathlib import Path

from megatron_sov.base.errors import UserError, warn
from megatron_sov.commands.rl.checks import count_max_tokens
from megatron_sov.commands.rl.options import RlEnginesOptions
from megatron_sov.commands.train.setup.data_defaults import complete_stage
from megatron_sov.commands.train.setup.starts import request_with_model
from megatron_sov.infer.engine import ENGINE_SET
from megatron_sov.infer.engines.server_engine import parse_server_settings
from megatron_sov.infer.engines.server_process import ServerProcess, check_vllm_program
from megatron_sov.model.pretrained import CONFIG, is_hf_folder

POLL_S = 1.0
"""Interval between two looks at a server, or at the model's folder."""
RESTART_S = 10.0
"""Pause before a restart, long enough for the trainer to notice: only then it sends weights again."""


def keep_servers(options: RlEnginesOptions) -> None:
    """Keep the servers running until SIGTERM or SIGINT."""
    check_vllm_program((), options.engine_python)
    request = request_with_model(options, options.start_from, "policy")
    config = complete_stage(request, request.config(), "policy", None, 0).config
    settings = parse_server_settings(options.engine_set, ENGINE_SET)
    places, host = options.places(options.run), socket.gethostname()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    model = _wait_for_model(options, stop)
    failures: list[str] = []

    def run_server(server: ServerProcess) -> None:
        if failure := keep_server(server, f"{host}:{server.port}", settings.restarts, stop):
            failures.append(failure)
            stop.set()

    servers = [ServerProcess(
        number, model, longest=count_max_tokens(config.rollout, None), settings=settings,
        logs=places.logs / host, with_routes=config.policy.router_replay, python=places.python,
        port=options.port + number)
        for number in range(settings.servers)]
    threads = [threading.Thread(target=run_server, args=[server]) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise UserError(failures[0])


def keep_server(server: ServerProcess, address: str, restarts: int, stop: threading.Event, *,
                poll_s: float = POLL_S, restart_s: float = RESTART_S) -> str:
    """Keep a server running until `stop` is set; return the reason if it cannot be started, or ""."""
    num_failures = 0
    try:
        while not stop.is_set():
            try:
                answer = server.start(stop.is_set)
            except UserError as e:
                num_failures += 1
                if num_failures > restarts:
                    return str(e)
                warn(f"{e}; restarting")
                stop.wait(restart_s)
                continue
            if answer is None:
                break
            num_failures = 0
            print(f"{address} answers", flush=True)
            while server.is_alive() and not stop.wait(poll_s):
                pass
            if not stop.is_set():
                warn(f"{address}: its server has ended (see {server.log}); restarting")
                stop.wait(restart_s)
        return ""
    finally:
        server.end()


def _wait_for_model(options: RlEnginesOptions, stop: threading.Event) -> Path:
    """Return the Hugging Face folder for the servers: --from, or the run's conversion."""
    if is_hf_folder(options.start_from):
        return options.start_from
    model = options.run / "engines" / "model"
    if not (model / CONFIG).is_file():
        print(f"waiting until the run writes {model}", file=sys.stderr, flush=True)
    while not (model / CONFIG).is_file() and not stop.wait(POLL_S):
        pass
    return model
