"""`megatron-sov eval ppl | needle | pairs | passk | media | lm`."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from megatron_sov.base.command_line import Command
from megatron_sov.base.settings import Actions, AtLeastOne, DeclaredCommand, Flag, add_actions, run_action
from megatron_sov.commands.evaluate.task import HeldoutOptions, OutOptions, check_task
from megatron_sov.commands.shared_options import ModelPath
from megatron_sov.infer.request import RankOptions
from megatron_sov.model.config import Language, NeedleKind


@dataclass(frozen=True, kw_only=True)
class PplOptions(HeldoutOptions, OutOptions, RankOptions):
    """Loss and bits per byte on held-out documents, per source."""

    target: ModelPath
    max_tokens: AtLeastOne | None = None
    """Held-out tokens of a source (default: the run's setting)."""


@dataclass(frozen=True, kw_only=True)
class NeedleOptions(OutOptions, RankOptions):
    """Needle-in-a-haystack accuracy by length and depth, among other needles."""

    data: Annotated[tuple[str, ...], Flag(value="DIR")]
    """Token shards with held-out documents."""
    language: Annotated[tuple[str, ...], Flag(value="SOURCE=LANGUAGE")] = ()
    """A source's language, where its text does not show it."""
    kinds: Annotated[tuple[NeedleKind, ...], Flag(many=True)] = ()
    """What is asked (default: the setting)."""
    languages: Annotated[tuple[Language, ...], Flag(many=True)] = ()
    """Languages of the text (default: all that there is)."""
    lengths: Annotated[tuple[int, ...], Flag(many=True)] = ()
    """Context lengths in tokens (default: the setting)."""
    depths: Annotated[tuple[float, ...], Flag(value="D", many=True)] = ()
    """Places of the first needle, 0 = start, 1 = end."""
    samples: int | None = None
    """Examples of a cell (default: the setting)."""
    distractor_share: Annotated[float | None, Flag(value="S")] = None
    """Part of each context that needles with other keys fill (default: the setting)."""
    seed: int = 0
    """Of keys, values and text (default 0)."""
    target: ModelPath


@dataclass(frozen=True, kw_only=True)
class PairsOptions(HeldoutOptions, OutOptions, RankOptions):
    """Share of held-out pairs whose better answer the model would rather write."""

    target: ModelPath


RUN = "megatron_sov.commands.evaluate.eval_run"
PPL = DeclaredCommand(PplOptions, check_task, f"{RUN}:evaluate_ppl")
NEEDLE = DeclaredCommand(NeedleOptions, check_task, f"{RUN}:evaluate_needle")
PAIRS = DeclaredCommand(PairsOptions, check_task, f"{RUN}:evaluate_pairs")
ACTIONS: Actions = {
    "ppl": PPL, "needle": NEEDLE, "pairs": PAIRS,
    "passk": Command("megatron_sov.commands.evaluate.eval_passk:PASSK",
                     "Sample responses to prompts, have a reward judge them, estimate pass@k and maj@k"),
    "media": Command("megatron_sov.commands.evaluate.eval_media:MEDIA",
                     "From text, pictures and speech to one another, judged by what is recognised"),
    "lm": Command("megatron_sov.commands.evaluate.eval_lm:LM",
                  "Score a model on tasks of lm-eval's form, by its own prompts and metrics, offline",
                  page="eval_lm.md")}
add_arguments = partial(add_actions, actions=ACTIONS)
run = partial(run_action, ACTIONS)
