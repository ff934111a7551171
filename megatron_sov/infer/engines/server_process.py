"""Engine servers of a command: started on this machine, and ended with it, also where it is killed."""

from __future__ import annotations

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
from megatron_sov.runs.launch_environment import local_gpu_index
from megatron_sov.work.endpoints.token_server import TokenServer
from megatron_sov.work.endpoints.transport import find_missing_libraries
from megatron_sov.work.endpoints.vllm_server import VLLM, SendFiles, VllmServer
from megatron_sov.work.processes.children import start_command
from megatron_sov.work.processes.supervisor import SupervisedCommand

ENGINE_PYTHON = "SOV_ENGINE_PYTHON"
"""Variable of the environment: the interpreter that has the engine, whose libraries are other versions."""
BY = f"{ENGINE_PYTHON} (`rl run`, `rl generate`: or --engine-python)"
WORKER_FOLDER = Path(vllm_worker.__file__).parent
EXTENSION, BACKEND = "sov_vllm_worker.Extension", "sov_files"
"""The module in that folder, and what it calls its way of taking weights."""
STOP_S = 20.0
"""For a server to end; then all its processes are killed."""
LAST_LINES = 8
"""Of its log, which are told where it does not start."""
_LOOK_S = 0.5
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR",
             "MASTER_PORT")
"""Variables of the trainer's processes, by which a server would take itself for one of them."""


@dataclass(frozen=True)
class EngineProgram:
    """An engine as a program."""

    title: str
    module: str
    """That its interpreter has."""
    words: tuple[str, ...]
    """Behind the interpreter."""
    connect: Callable[[str, EngineServers], TokenServer]
    """From an address to the server there, which is asked and given weights as the settings say."""
    quantizations: tuple[str, ...]
    """Names of what it knows, as its own command line has them."""


PROGRAMS = {
    VLLM: EngineProgram(
        "vLLM", "vllm", ("-m", "vllm.entrypoints.cli.main", "serve"),
        lambda url, asked: VllmServer(url, answer_s=asked.answer_s, send=asked.sending()),
        ("auto_awq", "auto_gptq", "awq", "awq_marlin", "compressed-tensors", "deepseek_v4_fp8",
         "experts_int8", "fp8", "fp8_per_block", "fp8_per_channel", "fp8_per_tensor", "gpt_oss_mxfp4",
         "gptq", "gptq_marlin", "humming", "inc", "int8_per_channel_weight_only", "modelopt",
         "modelopt_fp4", "modelopt_mixed", "modelopt_mxfp8", "moe_wna16", "mxfp4", "mxfp8",
         "nvfp4_per_token", "online", "quark", "torchao"))}
"""By name of the engine; as of vLLM 0.32."""


@dataclass(frozen=True)
class EngineServers:
    """How servers are started and asked."""

    servers: AtLeastOne = 1
    """Servers on this machine, each with the whole model."""
    tp: AtLeastOne = 1
    """GPUs (processes on a CPU) that a server splits each layer over."""
    dp: AtLeastOne = 1
    """Copies of the model inside a server."""
    ep: bool = False
    """Whether experts are split over all GPUs of a server, rather than each of them."""
    memory_share: Annotated[float, Gt(0), Le(1)] = 0.9
    """Of a GPU's memory."""
    quantization: str = ""
    """The engine's name, e.g. fp8; empty: the weights as they are."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights and of what is computed; auto: as the folder has them."""
    requests: AtLeastOne = 256
    """Responses that each copy of the model writes at a time."""
    devices: tuple[str, ...] = ()
    """GPUs of the servers, in order; empty: all that there are, which a trainer on this machine needs too."""
    start_s: AboveZero = 1800.0
    """For a server to load the model."""
    answer_s: AboveZero = 7200.0
    """For a response."""
    restarts: AtLeastOne = 5
    """Starts of a server without one answer in between, before the command ends."""
    weights: Path = Path("/dev/shm")
    """Where new weights lie for servers to read: shared memory, or a folder that servers of other machines
    see too, unless a collective brings them."""
    transfer: Literal["files", "collective"] = "files"
    """How weights come from there to servers: these read files, or the trainer sends them over a group of
    NCCL (without a GPU: gloo) with a server's workers, which must reach its machine."""
    more: tuple[str, ...] = ()
    """Further words of the server's command line."""

    def problems(self) -> list[SettingsProblem]:
        """Return what does not go together."""
        wanted = self.servers * self.tp * self.dp
        if self.devices and len(self.devices) != wanted:
            return [SettingsProblem(ProblemCode.RULE, "devices", f"must be {wanted}, servers x tp x dp, or "
                                    "none", list(self.devices))]
        return []

    def problems_of(self, engine: str) -> list[SettingsProblem]:
        """Return what an engine does not know."""
        program, p = PROGRAMS[engine], []
        if self.quantization and self.quantization not in program.quantizations:
            p.append(SettingsProblem(ProblemCode.RULE, "quantization", f"{program.title} has "
                                     f"{', '.join(program.quantizations)}", self.quantization))
        return p

    @property
    def room(self) -> int:
        """Return how many responses a server writes at a time."""
        return self.requests * self.dp

    def sending(self) -> SendFiles | None:
        """Return what sends weights to a server of vLLM; None: it reads them."""
        if self.transfer == "files":
            return None
        import torch

        from megatron_sov.engine.parallel.device import on_gpu
        from megatron_sov.infer.vllm_worker.sov_weight_group import send_files

        # threads have a current GPU of their own, which is not this process's
        return partial(send_files, device=f"cuda:{local_gpu_index(torch.cuda.device_count())}" if on_gpu()
                       else "cpu")

    def devices_of(self, number: int) -> str | None:
        """Return CUDA_VISIBLE_DEVICES of a server; None: all."""
        each = self.tp * self.dp
        return ",".join(self.devices[number * each:(number + 1) * each]) if self.devices else None


def _interpreter(python: Path | None) -> str:
    return str(python or os.environ.get(ENGINE_PYTHON, "") or sys.executable)


def refuse_no_engine(engine: str, urls: Sequence[str], python: Path | None) -> None:
    """Refuse servers that nothing here can start, or ask.

    Args:
        engine: one of `PROGRAMS`.
        urls: of servers that somebody else has started; none: they are started here.
        python: the interpreter that has the engine; None: as the environment says, or this one.

    Raises:
        UserError: a library that asks servers is missing, or the interpreter is none or has no such engine.
    """
    if missing := find_missing_libraries():
        raise UserError(f"--engine {engine}: {missing[0]}")
    if urls:
        return
    word, program = _interpreter(python), PROGRAMS[engine]
    if shutil.which(word) is None:
        raise UserError(f"--engine {engine}: {word} is no program that can be started; name the interpreter "
                        f"that has {program.title} by {BY}")
    looks = f"import importlib.util as i, sys; sys.exit(i.find_spec({program.module!r}) is None)"
    with open(os.devnull, "w") as out:
        code = start_command([word, "-c", looks], stdout=out, stderr=out.fileno(), ends_with_this=True).wait()
    if code:
        raise UserError(f"--engine {engine}: {word} has no {program.title}; install it into an environment "
                        f"of its own and name its interpreter by {BY}, or leave --engine out")


class OwnServer:
    """One server of this run; its methods but `end` are called from one thread."""

    def __init__(self, engine: str, number: int, folder: Path, longest: int, settings: EngineServers,
                 logs: Path, *, with_routes: bool = False, python: Path | None = None,
                 command: tuple[str, ...] = (), port: int = 0) -> None:
        """Start nothing yet.

        Args:
            engine: one of `PROGRAMS`.
            number: among the servers of the run.
            folder: of the model, as Hugging Face has it.
            longest: tokens of the longest sequence.
            settings: how.
            logs: folder of its log.
            with_routes: whether routes will be asked for.
            python: the interpreter that has the engine; None: as the environment says, or this one.
            command: in the place of the interpreter and the program's words.
            port: where other machines reach it; 0: a free one, which this machine alone reaches.
        """
        self._engine, self._program = engine, PROGRAMS[engine]
        self.port, self._host = port, "0.0.0.0" if port else "127.0.0.1"
        self.number, self._folder, self._longest, self._settings = number, folder, longest, settings
        self._with_routes = with_routes
        self._command = list(command) or [_interpreter(python), *self._program.words]
        self.log = logs / f"engine-{number}.log"
        self._kept: SupervisedCommand | None = None
        self._lock = threading.Lock()
        self._is_over = False

    def start(self, should_stop: Callable[[], bool]) -> TokenServer | None:
        """Return the server once it answers; None: it was asked to stop.

        Raises:
            UserError: it ends, or takes too long; its last lines are told.
        """
        self.kill()
        port = self.port or _free_port()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as out, self._lock:
            if self._is_over:
                return None
            self._kept = SupervisedCommand(self.words(port), self._environment(), out)
        server = self._program.connect(f"http://127.0.0.1:{port}", self._settings)
        ends_s = time.monotonic() + self._settings.start_s
        while not server.is_healthy():
            if should_stop():
                return None
            if not self.is_alive() or time.monotonic() >= ends_s:
                why = "ended" if not self.is_alive() else f"was not ready in {self._settings.start_s:g} s"
                said = self._last_lines()
                raise UserError(f"--engine {self._engine}: server {self.number} {why}"
                                + (f"; the end of {self.log}:\n{said}" if said
                                   else f"; it wrote nothing into {self.log}"))
            time.sleep(_LOOK_S)
        return server

    def is_alive(self) -> bool:
        return self._kept is not None and self._kept.is_alive

    def end(self) -> None:
        """End it, and all processes that it has started."""
        with self._lock:
            self._is_over = True
            self.kill(STOP_S)

    def kill(self, patience_s: float = 0.0) -> None:
        """End its processes; after that many seconds without asking any more."""
        if self._kept is not None:
            self._kept.end(patience_s)

    def words(self, port: int) -> list[str]:
        """Return the command line."""
        asked = self._settings
        words = [*self._command, str(self._folder), "--served-model-name", "policy", "--host",
                 self._host, "--port", str(port), "--enable-scale-out",
                 "--skip-tokenizer-init", "--generation-config", "vllm", "--logprobs-mode",
                 "processed_logprobs", "--worker-extension-cls", EXTENSION,
                 "--weight-transfer-config", json.dumps({"backend": BACKEND}), "--max-model-len",
                 str(self._longest), "--max-num-seqs", str(asked.requests), "--dtype", asked.dtype,
                 "--gpu-memory-utilization", str(asked.memory_share),
                 # servers that draw alike would write one response to a prompt several times
                 "--seed", str(secrets.randbelow(1 << 31))]
        if asked.tp > 1:
            words += ["--tensor-parallel-size", str(asked.tp)]
        if asked.dp > 1:
            # one door: vLLM would open one for each copy, each of which can end its own requests alone
            words += ["--data-parallel-size", str(asked.dp), "--api-server-count", "1"]
        if asked.ep:
            words += ["--enable-expert-parallel"]
        if asked.quantization:
            words += ["--quantization", asked.quantization]
        if self._with_routes:
            words += ["--enable-return-routed-experts"]
        return words + list(asked.more)

    def _environment(self) -> dict[str, str]:
        found = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        if (devices := self._settings.devices_of(self.number)) is not None:
            found["CUDA_VISIBLE_DEVICES"] = devices
        path = [str(WORKER_FOLDER), *filter(None, [found.get("PYTHONPATH")])]
        # weights change by routes that only this mode has: others must not reach the server's port
        return found | {"PYTHONPATH": os.pathsep.join(path), "VLLM_SERVER_DEV_MODE": "1",
                        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

    def _last_lines(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().split("\n")
        return "\n".join(lines[-LAST_LINES:])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
