"""`megatron-sov eval ppl | needle | pairs | passk | media | lm`."""

from dataclasses import dataclass
from typing import Annotated

from megatron_sov.base.command_line import Command
from megatron_sov.base.settings import ActionGroup, AtLeastOne, DeclaredCommand, Flag
from megatron_sov.commands.evaluate.task import HeldoutOptions, OutOptions, check_task
from megatron_sov.commands.shared_options import ModelPath
from megatron_sov.infer.request import RankOptions
from megatron_sov.model.config import Language, NeedleKind

RUN = "megatron_sov.commands.evaluate.eval_run"


@dataclass(frozen=True, kw_only=True)
class PplOptions(HeldoutOptions, OutOptions, RankOptions):
    """Loss and bits per byte on held-out documents, per source."""

    target: ModelPath
    max_tokens: AtLeastOne | None = None
    """Held-out tokens per source (default: the run's setting)."""


@dataclass(frozen=True, kw_only=True)
class NeedleOptions(OutOptions, RankOptions):
    """Needle-in-a-haystack accuracy by length and depth, with distractor needles."""

    data: Annotated[tuple[str, ...], Flag(value="DIR")]
    """Token shards with held-out documents."""
    language: Annotated[tuple[str, ...], Flag(value="SOURCE=LANGUAGE")] = ()
    """A source's language, if the text does not show it."""
    kinds: Annotated[tuple[NeedleKind, ...], Flag(many=True)] = ()
    """Question types (default: the setting)."""
    languages: Annotated[tuple[Language, ...], Flag(many=True)] = ()
    """Text languages (default: every language in the data)."""
    lengths: Annotated[tuple[int, ...], Flag(many=True)] = ()
    """Context lengths in tokens (default: the setting)."""
    depths: Annotated[tuple[float, ...], Flag(value="D", many=True)] = ()
    """Depths for the first needle: 0 = start, 1 = end."""
    samples: int | None = None
    """Examples per cell (default: the setting)."""
    distractor_share: Annotated[float | None, Flag(value="S")] = None
    """Context share filled with distractor needles (default: the setting)."""
    seed: int = 0
    """Random seed for keys, values and text (default 0)."""
    target: ModelPath


@dataclass(frozen=True, kw_only=True)
class PairsOptions(HeldoutOptions, OutOptions, RankOptions):
    """Score held-out pairs: the share in which the chosen response is likelier than the rejected response."""

    target: ModelPath


PPL = DeclaredCommand(PplOptions, check_task, f"{RUN}:evaluate_ppl")
NEEDLE = DeclaredCommand(NeedleOptions, check_task, f"{RUN}:evaluate_needle")
PAIRS = DeclaredCommand(PairsOptions, check_task, f"{RUN}:evaluate_pairs")
EVAL = ActionGroup({
    "ppl": PPL, "needle": NEEDLE, "pairs": PAIRS,
    "passk": Command("megatron_sov.commands.evaluate.eval_passk:PASSK",
                     "Sample responses to prompts, score them with a reward, and estimate pass@k and maj@k"),
    "media": Command("megatron_sov.commands.evaluate.eval_media:MEDIA",
                     "Accuracy of replies between text, pictures and speech, recognised by judges"),
    "lm": Command("megatron_sov.commands.evaluate.eval_lm:LM",
                  "Score a model on lm-eval tasks with their own prompts and metrics, offline",
                  page="eval_lm.md")})
