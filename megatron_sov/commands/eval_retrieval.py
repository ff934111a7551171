"""`megatron-sov eval media --retrieval`: which of many texts belongs to a picture or a sound, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sov.commands.media_options import EvalMediaOptions, shown_media
from megatron_sov.commands.shared_options import step_of
from megatron_sov.errors import UserError
from megatron_sov.eval.media.pairs import RETRIEVAL, Row, read_rows
from megatron_sov.generate.request import Batching
from megatron_sov.runs.append import RunEvents

if TYPE_CHECKING:
    from megatron_sov.generate.target import Target

EVENT = "media_retrieval"


def retrieval_rows(args: EvalMediaOptions) -> list[tuple[str, list[Row]]]:
    """Return the pairs that are asked for, with their rows.

    Raises:
        UserError: there is no such pair, or rows are malformed.
    """
    found = []
    for item in args.retrieval:
        name, _, file = item.partition("=")
        if name not in RETRIEVAL or not file:
            raise UserError(f"--retrieval {item}: must have the form PAIR=FILE.jsonl, with one of "
                            f"{', '.join(RETRIEVAL)}")
        rows = read_rows(Path(file))
        kind = RETRIEVAL[name][0].partition("-")[0]
        if bare := [n for n, row in enumerate(rows, 1) if all(part.get("type") != kind for part in
                                                             row.content)]:
            raise UserError(f"--retrieval {item}: row {bare[0]} shows no {kind}; each shows one to be found")
        if len({row.answer for row in rows}) < 2:
            raise UserError(f"--retrieval {item}: all rows have one answer, so there is nothing to choose "
                            "from; pass rows of several")
        found.append((name, rows))
    return found


def retrieved(args: EvalMediaOptions, target: Target, name: str, rows: list[Row],
              events: RunEvents) -> dict[str, Any]:
    """Return direction -> figures of a pair; {} on other processes than the first."""
    from megatron_sov.eval.media.retrieval import figures, grouped, likelihoods, ranks

    groups = grouped(rows, args.candidates, args.sampling.seed)
    scores = likelihoods(target, rows, groups, shown_media(args, args.media_root), chat=not args.no_chat,
                         with_features=not args.no_features, batching=Batching(args.batch_size),
                         settings=args.settings, nproc=args.nproc)
    if scores is None:
        return {}
    found = {way: figures(of) for way, of in zip(RETRIEVAL[name], ranks(rows, groups, scores), strict=True)}
    step = step_of(target, events)
    for way, told in found.items():
        events.add(EVENT, step=step, pair=way, **{k: v for k, v in told.items() if k != "ranks"})
    return {f"retrieval/{way}": told for way, told in found.items()}


def retrieval_line(name: str, told: dict[str, Any]) -> str:
    """Return what a direction comes to."""
    shares = []
    for k in (1, 5):
        low, high = told[f"recall_at_{k}_interval"]
        shares.append(f"recall@{k} {told[f'recall_at_{k}']:.1%} ({low:.1%} to {high:.1%}; chance "
                      f"{told[f'chance_at_{k}']:.1%})")
    return (f"{name:<22} {told['num_questions']:>5} questions, {told['num_candidates']:.0f} candidates: "
            f"{', '.join(shares)}, mean rank {told['mean_rank']:.2f} (chance {told['chance_mean_rank']:.2f})")
