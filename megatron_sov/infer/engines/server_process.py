"""Start engine servers on this machine; servers stop with the command, even if the command is killed."""

import json
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Gt, Le

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import AboveZero, AtLeastOne, ProblemCode, SettingsProblem
from megatron_sov.infer import vllm_worker
from megatron_sov.infer.request import VLLM
from megatron_sov.work.endpoints.transport import find_missing_libraries
from megatron_sov.work.endpoints.vllm_server import SendFiles, VllmServer
from megatron_sov.work.processes.children import start_command
from megatron_sov.work.processes.supervisor import SupervisedCommand

ENGINE_PYTHON = "SOV_ENGINE_PYTHON"
"""Environment variable with vLLM's Python interpreter; vLLM needs other library versions."""
WAYS_TO_SET_PYTHON = f"{ENGINE_PYTHON} (`rl run`, `rl generate`: or --engine-python)"
WORKER_FOLDER = Path(vllm_worker.__file__).parent
EXTENSION, BACKEND = "sov_vllm_worker.Extension", "sov_files"
"""Worker extension in `WORKER_FOLDER`, and the name of its weight transfer backend."""
STOP_S = 20.0
"""Seconds for a server to stop before its processes are killed."""
LAST_LINES = 8
"""Log lines quoted in the error if a server does not start."""
_POLL_INTERVAL_S = 0.5
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR",
                   "MASTER_PORT")
"""Variables from a trainer's environment that a server would misread."""


@dataclass(frozen=True)
class EngineServers:
    """Settings for starting engine servers and for requests."""

    servers: AtLeastOne = 1
    """Servers on this machine; each loads the whole model."""
    tp: AtLeastOne = 1
    """GPUs (on a CPU: processes) over which a server splits each layer."""
    dp: AtLeastOne = 1
    """Model copies inside a server."""
    ep: bool = False
    """Whether whole experts are spread over a server's `tp` * `dp` GPUs; false: each expert is split over
    `tp` GPUs."""
    memory_share: Annotated[float, Gt(0), Le(1)] = 0.9
    """Share of GPU memory that a server may use."""
    quantization: str = ""
    """vLLM's --quantization, e.g. fp8; empty: the stored weights."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights and computation; auto: the folder's dtype."""
    requests: AtLeastOne = 256
    """Responses that a model copy generates at a time."""
    devices: tuple[str, ...] = ()
    """CUDA device ids for the servers, in order; empty: every GPU, which a trainer on this machine needs
    too."""
    start_s: AboveZero = 1800.0
    """Time limit for a server to load the model."""
    answer_s: AboveZero = 7200.0
    """Time limit for a response."""
    restarts: AtLeastOne = 5
    """Server starts in a row without an answer, after which the command ends."""
    weights: Path = Path("/dev/shm")
    """Folder for new weights (`transfer` = files): shared memory, or a folder that servers on other machines
    see too."""
    transfer: Literal["files", "collective"] = "files"
    """files: servers read weight files. collective: the trainer sends weights to the servers' workers over
    NCCL (without a GPU: gloo); workers must reach the trainer's machine."""
    more: tuple[str, ...] = ()
    """Further words for the server's command line."""

    def problems(self) -> list[SettingsProblem]:
        num_devices = self.servers * self.tp * self.dp
        if self.devices and len(self.devices) != num_devices:
            return [SettingsProblem(ProblemCode.RULE, "devices", f"must be {num_devices}, servers x tp x dp, "
                                    "or none", list(self.devices))]
        return []

    @property
    def room(self) -> int:
        """Answers that a server generates at a time."""
        return self.requests * self.dp

    def connect(self, url: str) -> VllmServer:
        """Return a client of the server at `url`."""
        return VllmServer(url, answer_s=self.answer_s, send=self._create_sender())

    def _create_sender(self) -> SendFiles | None:
        """Return `send_files` for this process's device; None: the server reads files."""
        if self.transfer == "files":
            return None
        # not at the top: both import torch, and settings are checked without it
        from megatron_sov.engine.parallel.device import describe_local_device
        from megatron_sov.infer.vllm_worker.sov_weight_group import send_files

        # pass the GPU explicitly: each thread has its own current device
        return partial(send_files, device=describe_local_device())

    def format_devices(self, number: int) -> str | None:
        """Return CUDA_VISIBLE_DEVICES for server `number`; None: every GPU."""
        devices_per_server = self.tp * self.dp
        if not self.devices:
            return None
        return ",".join(self.devices[number * devices_per_server:(number + 1) * devices_per_server])


def _find_interpreter(python: Path | None) -> str:
    return str(python or os.environ.get(ENGINE_PYTHON, "") or sys.executable)


def check_vllm_program(urls: Sequence[str], python: Path | None) -> None:
    """Raise `UserError` if servers cannot be started or reached.

    Args:
        urls: addresses of running servers; empty: servers are started here.
        python: Python interpreter with vLLM; None uses `SOV_ENGINE_PYTHON` or the current interpreter.

    Raises:
        UserError: a client library is missing, or the interpreter does not exist or lacks vLLM.
    """
    if missing := find_missing_libraries():
        raise UserError(f"--engine vllm: {missing[0]}")
    if urls:
        return
    word = _find_interpreter(python)
    if shutil.which(word) is None:
        raise UserError(f"--engine vllm: {word} is not an executable program; set the interpreter with vLLM "
                        f"by {WAYS_TO_SET_PYTHON}")
    import_check = f"import importlib.util as i, sys; sys.exit(i.find_spec({VLLM!r}) is None)"
    with open(os.devnull, "w") as out:
        code = start_command([word, "-c", import_check], stdout=out, stderr=out.fileno(),
                             ends_with_this=True).wait()
    if code:
        raise UserError(f"--engine vllm: {word} has no vLLM; install it into its own environment and set its "
                        f"interpreter by {WAYS_TO_SET_PYTHON}, or leave --engine out")


class ServerProcess:
    """A server process started by this run. Only `end` may be called from another thread.

    Args:
        number: index among the servers of the run.
        folder: Hugging Face folder of the model.
        longest: tokens of the longest sequence.
        settings: settings of the servers.
        logs: log folder.
        with_routes: start the server with routes.
        python: Python interpreter with vLLM; None uses `SOV_ENGINE_PYTHON` or the current interpreter.
        command: replaces interpreter and arguments.
        port: port that other machines can reach; 0 uses a free port of localhost.
    """

    def __init__(self, number: int, folder: Path, longest: int, settings: EngineServers, logs: Path, *,
                 with_routes: bool = False, python: Path | None = None, command: tuple[str, ...] = (),
                 port: int = 0) -> None:
        self.port, self._host = port, "0.0.0.0" if port else "127.0.0.1"
        self.number, self._folder, self._longest, self._settings = number, folder, longest, settings
        self._with_routes = with_routes
        self._command = list(command) or [
            _find_interpreter(python), "-m", "vllm.entrypoints.cli.main", "serve"]
        self.log = logs / f"engine-{number}.log"
        self._process: SupervisedCommand | None = None
        self._lock = threading.Lock()
        self._is_over = False

    def start(self, should_stop: Callable[[], bool]) -> VllmServer | None:
        """Start the server and return it once healthy; None if `should_stop` returned True. Raises
        `UserError`: the server ends or takes too long; the message has its last log lines."""
        self.kill()
        port = self.port or _free_port()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as out, self._lock:
            if self._is_over:
                return None
            self._process = SupervisedCommand(self.build_command(port), self._build_environment(), out)
        server = self._settings.connect(f"http://127.0.0.1:{port}")
        ends_s = time.monotonic() + self._settings.start_s
        while not server.is_healthy():
            if should_stop():
                return None
            if not self.is_alive() or time.monotonic() >= ends_s:
                why = "ended" if not self.is_alive() else f"was not ready in {self._settings.start_s:g} s"
                log_lines = self.log.read_text(encoding="utf-8", errors="replace").strip().split("\n")
                last_lines = "\n".join(log_lines[-LAST_LINES:])
                log = f"the end of {self.log}:\n{last_lines}" if last_lines else f"{self.log} is empty"
                raise UserError(f"--engine vllm: server {self.number} {why}; {log}")
            time.sleep(_POLL_INTERVAL_S)
        return server

    def is_alive(self) -> bool:
        return self._process is not None and self._process.is_alive

    def end(self) -> None:
        """Stop the server and its child processes."""
        with self._lock:
            self._is_over = True
            self.kill(STOP_S)

    def kill(self, patience_s: float = 0.0) -> None:
        """Stop the processes, by force after `patience_s`."""
        if self._process is not None:
            self._process.end(patience_s)

    def build_command(self, port: int) -> list[str]:
        settings = self._settings
        words = [*self._command, str(self._folder), "--served-model-name", "policy", "--host",
                 self._host, "--port", str(port), "--enable-scale-out",
                 "--skip-tokenizer-init", "--generation-config", "vllm", "--logprobs-mode",
                 "processed_logprobs", "--worker-extension-cls", EXTENSION,
                 "--weight-transfer-config", json.dumps({"backend": BACKEND}), "--max-model-len",
                 str(self._longest), "--max-num-seqs", str(settings.requests), "--dtype", settings.dtype,
                 "--gpu-memory-utilization", str(settings.memory_share),
                 # Servers with equal seeds would repeat the same answers.
                 "--seed", str(secrets.randbelow(1 << 31))]
        if settings.tp > 1:
            words += ["--tensor-parallel-size", str(settings.tp)]
        if settings.dp > 1:
            # a single API server: among several, each aborts only its own requests
            words += ["--data-parallel-size", str(settings.dp), "--api-server-count", "1"]
        if settings.ep:
            words += ["--enable-expert-parallel"]
        if settings.quantization:
            words += ["--quantization", settings.quantization]
        if self._with_routes:
            words += ["--enable-return-routed-experts"]
        return words + list(settings.more)

    def _build_environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
        if (devices := self._settings.format_devices(self.number)) is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        path = [str(WORKER_FOLDER), *filter(None, [environment.get("PYTHONPATH")])]
        # weight updates need the development routes; only this machine may reach the port
        return environment | {"PYTHONPATH": os.pathsep.join(path), "VLLM_SERVER_DEV_MODE": "1",
                              "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
