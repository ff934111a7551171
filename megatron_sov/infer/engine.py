"""Interface for inference engines: our generator on Megatron-Core, transformers, vLLM. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import AtLeastOne, Flag, SettingsError
from megatron_sov.infer.request import (
    MEGATRON, TRANSFORMERS, VLLM, Batching, EngineName, GenerationResult, NamedTensors, Sampling,
    ServerLocations, StopRule, Tokens)
from megatron_sov.work.endpoints.transport import find_address_problems

if TYPE_CHECKING:
    from megatron_sov.infer.engines.target import Target

ChosenEngine = Annotated[EngineName | None, Flag(
    help="Engine that runs the model (default: transformers for a Hugging Face folder)")]
PRECISION_KEY = "train.precision"
"""Precision setting for megatron and transformers."""
ENGINE_SET = "--engine-set"
"""Option for layout and precision in commands where --set has another meaning."""


class Engine(Protocol):
    """A loaded model that continues prompts. Methods are collective, with equal results on all processes."""

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, *, stop: StopRule | None = None,
                 streams: Sequence[int] | None = None) -> GenerationResult:
        """Continue prompts.

        Greedy continuations agree between engines up to rounding. Samples of different engines follow the
        same distribution, but differ.

        Args:
            prompts: token ids of each prompt, at least one.
            sampling: settings for choosing tokens.
            stop: ends continuations early.
            streams: random stream of each prompt, which determines its samples together with the seed;
                default: the index of the prompt.

        Raises:
            UserError: invalid sampling settings, the last update failed, or the engine cannot return routes.
        """

    def update(self, weights: NamedTensors | None, version: int) -> None:
        """Replace the weights in memory.

        Args:
            weights: all tensors of the model under their Hugging Face names, on each process of the engine,
                e.g. from `convert.export_weights`. None: the engine shares the trainer's model (megatron).
            version: version for `Generated.version`.

        Raises:
            UserError: the tensors do not match the model; the engine then refuses to generate until an update
                succeeds.
        """


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Engine options for commands where --set has another meaning."""

    engine: ChosenEngine = None
    engine_set: Annotated[tuple[str, ...], Flag(ENGINE_SET, "key=value")] = ()
    """Layout and precision, e.g. parallel.ep=2 (engine megatron); or servers, e.g. tp=8 (vllm)."""
    nproc: AtLeastOne | None = None
    """Local processes (engine megatron)."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Servers for `--engine vllm`."""

    engine_python: Annotated[Path | None, Flag(value="FILE")] = None
    """Python interpreter with the engine (default: $SOV_ENGINE_PYTHON, or the current interpreter)."""
    engine_url: Annotated[tuple[str, ...], Flag(value="URL")] = ()
    """A running server's address; repeat the option for several servers."""

    def places(self, run: Path) -> ServerLocations:
        """Return a run's server addresses, log folder and interpreter. Raises `UserError`: --engine-url is
        not an address."""
        for url in self.engine_url:
            if problems := find_address_problems("--engine-url", url, "the environment"):
                raise SettingsError("", problems)
        return ServerLocations(run / "engines", self.engine_url, self.engine_python)


def choose_engine(target: Target) -> EngineName:
    return TRANSFORMERS if target.is_hf else MEGATRON


def run_with_engine(name: str, target: Target, work: Callable[[Engine], Any], *, longest: int,
                    batching: Batching | None = None, settings: Sequence[str] = (),
                    nproc: int | None = None, option: str = "--set", with_routes: bool = False,
                    places: ServerLocations | None = None) -> Any:
    """Load a model into an engine, run `work` with it, and return the result.

    Args:
        name: one of `ENGINES`; all except megatron need a Hugging Face folder.
        target: model to load.
        work: called with the engine on each of its processes; returns JSON values.
        longest: tokens of the longest sequence, prompt and continuation.
        batching: memory limits.
        settings: `key=value` changes of layout and precision (megatron), precision (transformers) or servers.
        nproc: local processes (megatron).
        option: option that gives the settings, for messages.
        with_routes: start servers that return routes.
        places: servers and their logs; None starts servers here and deletes their logs.

    Returns:
        The result; None on processes other than the first of a torchrun or Slurm job.

    Raises:
        UserError: the engine is not installed or cannot load the model.
        SystemExit: a process failed and has reported its error.
    """
    # Import only the chosen engine: each takes seconds, and commands parse options without torch.
    if name == MEGATRON:
        from megatron_sov.infer.engines.load import run_megatron_engine

        return run_megatron_engine(target, settings, nproc, work, batching, option)
    if name == VLLM:
        from megatron_sov.infer.engines.server_engine import open_server_engine, parse_server_settings

        with open_server_engine(target.path, target.vocab_size, longest,
                                parse_server_settings(settings, option), places,
                                with_routes=with_routes) as engine:
            return work(engine)
    from megatron_sov.infer.engines.transformers_engine import HfEngine, load_configured_hf

    return work(HfEngine(load_configured_hf(target.path, settings, option), batching))


def check_engine(engine: str, target: Target, settings: Sequence[str], nproc: int | None,
                 option: str = "--set") -> None:
    """Raise `UserError` if an engine cannot run a model with the given options.

    Args:
        engine: one of `ENGINES`.
        target: the model.
        settings: `key=value` changes of layout and precision, or of servers.
        nproc: local processes.
        option: option that gives the settings.
    """
    if engine != MEGATRON and not target.is_hf:
        raise UserError(f"--engine {engine}: {target.path} is a checkpoint; "
                        "convert it first with `megatron-sov convert to-hf`")
    refused = settings if engine != VLLM else ()  # settings of servers
    if engine == TRANSFORMERS:
        refused = [setting for setting in refused if setting.partition("=")[0] != PRECISION_KEY]
    refused_options = [*(f"{option} {setting}" for setting in refused),
                       *([] if nproc is None else [f"--nproc {nproc}"])]
    if engine != MEGATRON and refused_options:
        verb = "is" if len(refused_options) == 1 else "are"
        raise UserError(f"{', '.join(refused_options)}: {verb} for --engine {MEGATRON}; "
                        "add it or leave this out")
