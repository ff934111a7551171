"""One interface to each program that runs a model: our own generator on Megatron-Core, transformers, servers
of vLLM.  No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, get_args

from megatron_sov.base.settings import Flag
from megatron_sov.infer.request import Batching, Generated, NamedTensors, Sampling, StopRule, Tokens

if TYPE_CHECKING:
    from megatron_sov.infer.engines.server_engine import ServerPlaces
    from megatron_sov.infer.engines.target import Target

EngineName = Literal["megatron", "transformers", "vllm"]
MEGATRON, TRANSFORMERS, VLLM = ENGINES = get_args(EngineName)
"""Engines by name: the first runs checkpoints at any layout, the others Hugging Face folders."""
SERVED = (VLLM,)
"""Those that are servers of their own."""
ChosenEngine = Annotated[EngineName | None, Flag(
    help="What runs the model (default: transformers for a Hugging Face folder)")]
PRECISION_KEY = "train.precision"
"""The setting that megatron and transformers share."""
ENGINE_SET = "--engine-set"
"""Gives layout and precision where --set gives something else."""


class Engine(Protocol):
    """A loaded model that continues prompts; where it runs on several processes, called by all together,
    and all get the same."""

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, *, stop: StopRule | None = None,
                 streams: Sequence[int] | None = None) -> Generated:
        """Continue prompts.

        Greedy continuations are those of any other engine, up to rounding; samples follow the same
        distribution, and are the same only for the same engine.

        Args:
            prompts: token ids of each prompt, at least one.
            sampling: how tokens are chosen.
            stop: what ends a continuation early.
            streams: number of each prompt's stream of random numbers, which with the seed decides its
                samples; the prompt's place in the list unless given.

        Raises:
            UserError: the sampling has no meaning, the last update failed, or routes are asked for and the
                engine does not tell them.
        """
        ...

    def update(self, weights: NamedTensors | None, version: int) -> None:
        """Write with other weights from now on, without a file.

        Args:
            weights: every tensor of the model under its Hugging Face name, once, as `convert.export_weights`
                gives them; on each process that the engine runs on.  None: the engine's model is the one that
                trains and has them already (megatron).
            version: what `Generated.version` says of them.

        Raises:
            UserError: they are not this model's; the engine refuses all work then, until an update succeeds.
        """
        ...


def engine_for(target: Target) -> EngineName:
    """Return the engine that runs a model where the user has chosen none."""
    return TRANSFORMERS if target.is_hf else MEGATRON


def run_engine(name: str, target: Target, work: Callable[[Engine], Any], *, longest: int,
               batching: Batching | None = None, settings: Sequence[str] = (),
               nproc: int | None = None, option: str = "--set", with_routes: bool = False,
               places: ServerPlaces | None = None) -> Any:
    """Load a model into an engine, and return what some work with it gave.

    Args:
        name: one of `ENGINES`; all but megatron need a Hugging Face folder.
        target: the model.
        work: is given the engine, on every process that it runs on; its result must be plain JSON values.
        longest: tokens of the longest sequence, prompt and continuation.
        batching: what bounds memory.
        settings: `key=value` changes of layout and precision (megatron), of precision (transformers), or of
            servers.
        nproc: local processes (megatron).
        option: that the settings are given by, for sentences.
        with_routes: whether the work asks for routes, which servers must be started for.
        places: where servers and their logs are; None: here, and their logs go with them.

    Returns:
        The result; None on other processes than the first of a torchrun or Slurm job.

    Raises:
        UserError: the engine is not installed, or cannot load the model.
        SystemExit: a process failed, after it has said why.
    """
    # Imported where they are run: commands read options without torch.
    if name == MEGATRON:
        from megatron_sov.infer.decoder.generator import MegatronEngine
        from megatron_sov.infer.engines.load import run_forward_model

        return run_forward_model(target, settings, nproc,
                                 lambda loaded: work(MegatronEngine(loaded.policy, batching)), option)
    if name in SERVED:
        from megatron_sov.infer.engines.server_engine import server_settings, serving_engine

        with serving_engine(name, target.path, target.vocab_size, longest,
                            server_settings(name, settings, option), places,
                            with_routes=with_routes) as engine:
            return work(engine)
    from megatron_sov.infer.engines.libraries import HfEngine, load_configured_hf

    return work(HfEngine(load_configured_hf(target.path, settings, option), batching))
