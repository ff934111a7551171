"""Retrieval: which of many texts a model holds for the most probable behind a picture or a sound, and behind
which of them a text is the most probable.

Rows stand in groups; the candidates of a row are those of its group.  One table of log-likelihoods, of each
text of the group behind each of its media, tells both directions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from megatron_sov.eval.intervals import mean_interval, wilson_interval
from megatron_sov.eval.media.pairs import Row
from megatron_sov.generate.request import Batching
from megatron_sov.obs.work_bar import work_bar
from megatron_sov.runs.launch_environment import is_first

if TYPE_CHECKING:
    from megatron_sov.generate.load import Loaded
    from megatron_sov.generate.shown_media import ShownMedia
    from megatron_sov.generate.target import Target

RECALLS = (1, 5)


@dataclass(frozen=True)
class Group:
    """Rows that are candidates for each other."""

    rows: list[int]
    """Numbers of the rows."""
    answers: list[str]
    """Their answers, each once."""


@dataclass(frozen=True)
class Rank:
    """Where the best right candidate of a question stands."""

    rank: int
    """From 1; wrong candidates that are as good stand before it."""
    num_candidates: int
    """All of them."""
    num_right: int
    """How many of them are right."""


def grouped(rows: Sequence[Row], candidates: int, seed: int) -> list[Group]:
    """Return rows in groups of at most `candidates`, as even as can be, in an order of the seed."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    number = -(-len(rows) // candidates)
    ends = [len(rows) * i // number for i in range(number + 1)]
    parts = [order[start:end] for start, end in pairwise(ends)]
    return [Group(part, list(dict.fromkeys(rows[i].answer for i in part))) for part in parts]


def ranks(rows: Sequence[Row], groups: Sequence[Group],
          scores: Sequence[Sequence[Sequence[float]]]) -> tuple[list[Rank], list[Rank]]:
    """Return the ranks of texts behind media, one for each row in the order of groups, and of media for
    texts, one for each answer of each group.

    Args:
        rows: all.
        groups: of their numbers.
        scores: of each group [rows, answers].
    """
    texts, media = list[Rank](), list[Rank]()
    for group, table in zip(groups, scores, strict=True):
        for number, behind in zip(group.rows, table, strict=True):
            texts.append(_rank(behind, [a == rows[number].answer for a in group.answers]))
        for place, answer in enumerate(group.answers):
            media.append(_rank([behind[place] for behind in table],
                               [rows[number].answer == answer for number in group.rows]))
    return texts, media


def _rank(scores: Sequence[float], right: Sequence[bool]) -> Rank:
    best = max(score for score, is_right in zip(scores, right, strict=True) if is_right)
    # not a number is no reason to be right
    before = sum(not score < best for score, is_right in zip(scores, right, strict=True) if not is_right)
    return Rank(1 + before, len(scores), sum(right))


def figures(found: Sequence[Rank]) -> dict[str, Any]:
    """Return recalls and the mean rank with 95 % intervals, and what chance gives.

    `recall_at_k` is the share of questions with a right candidate among the k best, with Wilson's interval.
    The interval of `mean_rank` is that of the mean of (rank - 1) / (most candidates - 1).  Questions of a
    group share their candidates, which the intervals do not know of.
    """
    num, most = len(found), max(one.num_candidates for one in found)
    told: dict[str, Any] = {"num_questions": num, "num_candidates": fmean(r.num_candidates for r in found)}
    for k in RECALLS:
        right = sum(one.rank <= k for one in found)
        told |= {f"recall_at_{k}": right / num, f"recall_at_{k}_interval": list(wilson_interval(right, num)),
                 f"chance_at_{k}": fmean(_chance(one, k) for one in found)}
    shares = [(one.rank - 1) / max(1, most - 1) for one in found]
    return told | {
        "mean_rank": fmean(one.rank for one in found),
        "mean_rank_interval": [1 + end * (most - 1) for end in mean_interval(shares)],
        # the first of r right ones among n, in an order by chance
        "chance_mean_rank": fmean((one.num_candidates + 1) / (one.num_right + 1) for one in found),
        "ranks": [one.rank for one in found]}


def _chance(one: Rank, k: int) -> float:
    """Return how often k candidates by chance have a right one among them."""
    k = min(k, one.num_candidates)
    return 1 - math.comb(one.num_candidates - one.num_right, k) / math.comb(one.num_candidates, k)


def likelihoods(target: Target, rows: Sequence[Row], groups: Sequence[Group], shown: ShownMedia, *,
                chat: bool, with_features: bool, batching: Batching, settings: Sequence[str] = (),
                nproc: int | None = None) -> list[list[list[float]]] | None:
    """Return log p(answer | what is shown) of each group [rows, answers]: the sum over the answer's tokens
    and what ends it.

    Args:
        target: the model.
        rows: all.
        groups: of their numbers.
        shown: the folder of media, and the tokenizers that see and hear.
        chat: whether prompts are framed by the chat template.
        with_features: whether encoders see what is shown.
        batching: what bounds memory.
        settings: `key=value` changes of layout and precision.
        nproc: local processes.

    Returns:
        None on other processes than the first of a torchrun or Slurm job.

    Raises:
        UserError: see `media_prompts.prompts_of`; or a row is longer than the model reads.
    """
    from megatron_sov.generate.asking import check_length
    from megatron_sov.generate.load import run_forward_model
    from megatron_sov.generate.media_prompts import prompts_of

    order = [number for group in groups for number in group.rows]
    prompts = prompts_of(target, [rows[number].content for number in order], shown, chat=chat,
                         with_features=with_features)
    ids = {row.answer: prompts.asker.answer(row.answer) for row in rows}
    longest = max(map(len, prompts.ids)) + max(map(len, ids.values()))
    check_length(target, longest, "the longest prompt and the longest answer", "shorten one of them")

    def work(loaded: Loaded) -> list[list[float]]:
        from megatron_sov.generate.answers import Question, answer_logprobs

        answers = [[ids[answer] for answer in group.answers] for group in groups for _ in group.rows]
        questions = [Question(prompt, of, media) for prompt, of, media
                     in zip(prompts.ids, answers, prompts.media, strict=True)]
        with work_bar("comparing", len(questions), "prompt", is_first()) as bar:
            told = answer_logprobs(loaded.policy, questions, batching, bar.update)
        return [[math.fsum(tokens) for tokens in of] for of in told]

    found: list[list[float]] | None = run_forward_model(target, list(settings), nproc, work)
    if found is None:
        return None
    told = iter(found)
    return [[next(told) for _ in group.rows] for group in groups]
