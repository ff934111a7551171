"""The file that says how a mixture is searched for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt, MinLen

from data_prep.mixture.blend_file import Where
from megatron_sov.base.settings import (
    AboveZero, AtLeastOne, Bound, Breach, NotBlank, NotNegative, ProblemCode, SettingsError, read,
    read_located, read_text)

FitName = Literal["auto", "log_ridge", "boosting"]
"""What predicts a loss from shares; auto: the one that predicts mixtures best that it has not seen."""
OWN_SETTINGS = ("train.steps", "train.seed", "data.phases", "data.paths")
"""Settings that the search gives to each model."""
MIN_FIRST_ROUND = 6
"""Mixtures of the first round: natural, uniform, and enough drawn ones to fit anything to."""


def _leaves_to_the_search(setting: str) -> Breach | None:
    return (ProblemCode.BOUND, f"must leave {', '.join(OWN_SETTINGS)} to the search, which has keys for them",
            "") if setting.startswith(OWN_SETTINGS) else None


def _too_few(rounds: tuple[int, ...]) -> Breach | None:
    return None if rounds[0] >= MIN_FIRST_ROUND else (
        ProblemCode.BOUND, f"must begin with at least {MIN_FIRST_ROUND}", "e.g. [24, 12, 6]")


@dataclass(frozen=True)
class MixtureSearchSettings:
    """How a mixture is searched for."""

    recipe: NotBlank
    """Recipe of the small models, or FILE.py:NAME."""
    targets: Annotated[Mapping[str, AboveZero], MinLen(1)]
    """Source -> weight of its held-out bits per byte in what is lowered.  It is trained on only where it is
    among `sources` as well."""
    steps: Annotated[int, Ge(1), Le(10**9)]
    """Optimizer steps of each model."""
    seq_len: Annotated[int, Ge(2), Le(10**8)]
    """Tokens of a sample."""
    name: NotBlank = "searched"
    """Name of the mixture, and of its phase."""
    settings: tuple[Annotated[NotBlank, Bound(_leaves_to_the_search)], ...] = ()
    """Further settings of the recipe, key=value, as --set takes them."""
    from_: str = ""
    """Checkpoint, run or Hugging Face folder that each model starts from; "": from initial weights."""
    sources: tuple[NotBlank, ...] = ()
    """Patterns over the names of the sources that are mixed; (): all but the targets."""
    group_by: str = ""
    """Tag of which each value is one cluster of sources with one share, such as topic; "": each source is its
    own."""
    rounds: Annotated[tuple[AtLeastOne, ...], MinLen(1), Bound(_too_few)] = (24, 12, 6)
    """Mixtures that are trained in each round; the later ones lie near the best."""
    judged: Annotated[int, Ge(0), Le(10_000)] = 6
    """Mixtures that are trained as well and never fitted, by which predictions are judged."""
    fit: FitName = "auto"
    """What predicts a loss from shares."""
    candidates: Annotated[int, Ge(100), Le(1_000_000)] = 20_000
    """Mixtures whose loss is predicted in each round."""
    tokens: NotNegative = 0
    """Tokens of the run that the mixture is for; 0: no share is capped."""
    max_epochs: AboveZero = 4.0
    """Passes over a source in that run, which cap its share."""
    seed: Annotated[int, Ge(0), Lt(1 << 31)] = 0
    """Seed of the drawn mixtures and of each model."""

    @property
    def num_proxies(self) -> int:
        """Return how many models are trained in all: rounds, those judged by, and the predicted best."""
        return sum(self.rounds) + self.judged + 1


def read_search(file: Path) -> MixtureSearchSettings:
    """Return what a search file says; its key `from`, which is no name in Python, is `from_`.

    Raises:
        SettingsError: it breaks rules; all mistakes are told, each with its line.
    """
    found = read_located(read_text(file))
    if found.problems:
        raise SettingsError(str(file), found.problems)
    raw = found.value
    if isinstance(raw, dict) and "from" in raw:
        raw = {"from_" if key == "from" else key: value for key, value in raw.items()}
        found.lines[("from_",)] = found.line(("from",))
    return read(MixtureSearchSettings, {} if raw is None else raw, str(file), lines=found.lines)


@dataclass(frozen=True)
class Cluster:
    """Sources that have one share together."""

    name: str
    """Name of the source, or the value of the tag."""
    members: dict[str, float] = field(default_factory=dict)
    """Source -> part of the cluster's share, by tokens."""
    num_tokens: int = 0
    """Training tokens of all members."""

    def where(self) -> Where:
        """Return the conditions of a blend's entry for these sources."""
        return {"source": tuple(self.members)}
