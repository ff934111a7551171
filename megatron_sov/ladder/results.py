"""What a ladder's runs gave, the law through it and its predictions: RUN/ladder.json."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import atomic_write, to_json
from megatron_sov.errors import UserError
from megatron_sov.ladder.laws import ParametricLaw, PowerLaw, Prediction
from megatron_sov.ladder.members import Member
from megatron_sov.obs.events import EVENTS, final_steps, read_events
from megatron_sov.obs.figures import number
from megatron_sov.runs.folder import COMPLETION

FILE = "ladder.json"
FORMAT_VERSION = 1
Law = PowerLaw | ParametricLaw


@dataclass(frozen=True)
class Point:
    name: str
    num_params: int
    num_tokens: int
    loss: float
    """Held-out loss at its end, in nats per token, over all held-out tokens."""


@dataclass(frozen=True)
class Told:
    """A prediction beside what came of it."""

    name: str
    num_params: int
    num_tokens: int
    predicted: Prediction
    made_s: float
    """Unix time at which it was first written: before its run began, unless that stood there already."""
    measured: float | None = None
    """Held-out loss of its run; None: there is none."""

    @property
    def error(self) -> float | None:
        return None if self.measured is None else self.predicted.loss / self.measured - 1

    @property
    def inside(self) -> bool | None:
        return (None if self.measured is None
                else self.predicted.low <= self.measured <= self.predicted.high)


def is_complete(run: Path) -> bool:
    return (run / COMPLETION).is_file()


def final_loss(run: Path) -> float:
    """Return a complete run's held-out loss at its end: the mean over the held-out tokens of all sources.

    Raises:
        UserError: nothing was held out, or the loss is no number.
    """
    evals = final_steps(list(read_events(run / EVENTS)), "eval")
    rows = evals[-1].get("heldout", {}).values() if evals else []
    tokens = sum(number(row.get("tokens")) for row in rows)
    if not tokens > 0:
        raise UserError(f"{run}: has no held-out loss; pack the data with --heldout, and begin the ladder "
                        "anew")
    loss = sum(number(row.get("loss")) * number(row.get("tokens")) for row in rows) / tokens
    if not math.isfinite(loss):
        raise UserError(f"{run}: ended with a held-out loss of {loss}; look at its report, lower --set "
                        "optim.lr, and begin the ladder anew")
    return loss


def points(folder: Path, members: Sequence[Member]) -> list[Point]:
    """Return the runs that are complete.

    Raises:
        UserError: as `final_loss`.
    """
    return [Point(m.name, m.num_params, m.num_tokens, final_loss(folder / m.name))
            for m in members if is_complete(folder / m.name)]


def fitted(found: Sequence[Point]) -> Law:
    """Return the law through runs: that of size alone where all saw as many tokens per parameter.

    Raises:
        UserError: they are too few, or have no such law.
    """
    params, tokens, losses = ([getattr(p, name) for p in found]
                              for name in ("num_params", "num_tokens", "loss"))
    ratios = {round(p.num_tokens / p.num_params, 3) for p in found}
    return ParametricLaw(params, tokens, losses) if len(ratios) > 1 else PowerLaw(params, losses)


def tell(law: Law, member: Member, folder: Path) -> Told:
    """Return the prediction for a model, with what its run gave where it is complete; one that was written
    before and is the same keeps its time."""
    predicted = law.predict(member.num_params, member.num_tokens)
    made_s = time.time()
    for earlier in read(folder).get("predictions", []):
        if earlier["name"] == member.name and earlier["predicted"] == asdict(predicted):
            made_s = earlier["made_s"]
    run = folder / member.name
    return Told(member.name, member.num_params, member.num_tokens, predicted, made_s,
                final_loss(run) if is_complete(run) else None)


def read(folder: Path) -> dict[str, Any]:
    """Return what the folder's file holds; nothing where there is none.

    Raises:
        UserError: it is damaged, or of a newer version.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        version = int(found["format_version"])
        for told in found.get("predictions", []):
            if not {"name", "predicted", "made_s"} <= set(told) or not math.isfinite(told["made_s"]):
                raise ValueError(f"a prediction in it is {str(told)[:80]}")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{file}: is damaged ({e}); delete it, it is written anew from the runs") from None
    if version > FORMAT_VERSION:
        raise UserError(f"{file}: has format version {version}, and this version reads {FORMAT_VERSION}; "
                        "use the newer megatron-sov")
    return dict(found)


def write(folder: Path, recipe: str, rates: str, found: Sequence[Point], law: Law,
          told: Sequence[Told]) -> None:
    atomic_write(folder / FILE, to_json({
        "format_version": FORMAT_VERSION, "kind": "ladder", "recipe": recipe, "rates": rates,
        "points": list(found),
        "law": {"form": law.name, "parameters": law.parameters()},
        "predictions": [{**asdict(t), "error": t.error, "inside": t.inside} for t in told]}))
