"""How well a model gets from one modality to another: rows that ask for a pair of them, judges that recognise
what it made, and figures; or retrieval, which of many texts it holds for the most probable behind a
picture or a sound, and back.

Rows of a retrieval stand in groups; the candidates of a row are those of its group.  One table of
log-likelihoods, of each text of the group behind each of its media, tells both directions.
"""

from __future__ import annotations

import json
import math
import random
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from megatron_sov.base.errors import UserError
from megatron_sov.base.plugins.loading import calling, load
from megatron_sov.eval.statistics import mean_interval, wilson_interval
from megatron_sov.infer.request import Batching
from megatron_sov.runs.launch_environment import is_first
from megatron_sov.work.progress.progress_bar import work_bar

if TYPE_CHECKING:
    from megatron_sov.infer.engines.load import Loaded
    from megatron_sov.infer.engines.target import Target
    from megatron_sov.omni.generation.prompts import ShownMedia

TEXT, IMAGE, AUDIO = "text", "image", "audio"
PAIRS = {f"{a}-{b}": (a, b) for a in (IMAGE, TEXT, AUDIO) for b in (TEXT, IMAGE, AUDIO)
         if (a, b) not in ((TEXT, TEXT), (IMAGE, IMAGE))}
"""Name -> what is shown, and what is asked for."""
RETRIEVAL = {f"{kind}-{TEXT}": (f"{kind}-{TEXT}", f"{TEXT}-{kind}") for kind in (IMAGE, AUDIO)}
"""Pair of rows whose texts are ranked behind media -> that, and media ranked for texts."""


@dataclass(frozen=True)
class MediaRow:
    """A prompt with what is to be recognised in the reply."""

    content: list[dict[str, Any]]
    """Parts, as `generation.prompts.Parts`."""
    answer: str
    """What a text is to be, or what a judge is to recognise."""
    labels: tuple[str, ...] = ()
    """What a judge chooses from; (): anything."""


def read_rows(file: Path) -> list[MediaRow]:
    """Return the rows of a JSONL file: `content`, `answer`, and `labels` where a judge chooses.

    Raises:
        UserError: it cannot be read, has no row, or one is malformed (named by number).
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--data {file}: cannot be read ({e}); pass a JSONL file in UTF-8") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            content, answer, labels = row["content"], row["answer"], row.get("labels", [])
            if not (isinstance(content, list) and content and all(isinstance(p, dict) for p in content)
                    and isinstance(answer, str) and answer and isinstance(labels, list)
                    and all(isinstance(label, str) for label in labels)):
                raise TypeError("content is a list of parts, answer a text that is not empty, labels texts")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{file}:{number}: is no row ({type(e).__name__}: {e}); write "
                            '{"content": [parts], "answer": "..."}') from None
        found.append(MediaRow(content, answer, tuple(labels)))
    if not found:
        raise UserError(f"--data {file}: has no row")
    return found


def normalised(text: str) -> str:
    """Return a text as words are counted: lower case, punctuation as space, one space between words."""
    kept = "".join(c if c.isalnum() or c.isspace() else " " for c in text.casefold())
    return " ".join(kept.split())


def figures(rows: Sequence[MediaRow], heard: Sequence[str]) -> dict[str, Any]:
    """Return what was recognised against what was asked for.

    `accuracy` is the share of exact matches of normalised texts with Wilson's interval; `wer` and `cer` are
    errors of words and characters (jiwer) over all rows, `cer_interval` of the rows' own shares, each at most
    1; `chance` is the mean of 1 / labels where every row has some.
    """
    import jiwer

    wanted, got = [normalised(row.answer) for row in rows], [normalised(text) for text in heard]
    right = [a == b for a, b in zip(wanted, got, strict=True)]
    told: dict[str, Any] = {
        "num_rows": len(rows), "accuracy": sum(right) / len(right),
        "accuracy_interval": list(wilson_interval(sum(right), len(right)))}
    if all(wanted):
        # An answer that is much too long has an error above 1, and an interval of shares ends there.
        shares = [min(1.0, float(jiwer.cer(a, b))) for a, b in zip(wanted, got, strict=True)]
        told |= {"wer": float(jiwer.wer(wanted, got)), "cer": float(jiwer.cer(wanted, got)),
                 "cer_interval": list(mean_interval(shares))}
    if all(row.labels for row in rows):
        told["chance"] = sum(1 / len(row.labels) for row in rows) / len(rows)
    return told


Judge = Callable[[Sequence[Path], Sequence[Sequence[str]]], Sequence[str]]
"""Files and the labels of each to choose from -> what is recognised in each, "" where nothing is."""
JUDGE_LIMIT_S = 3600.0


def judge_of(said: str) -> Judge:
    """Return a judge: FILE.py:NAME is a function (files, labels) -> texts; anything else is a command that
    reads a JSON line {"file", "labels"} for each file and prints a JSON string for each.

    Raises:
        UserError: there is no such code, or the command is none.
    """
    file, _, name = said.rpartition(":")
    if file.endswith(".py") and name.isidentifier():
        loaded = load(said)
        if not callable(loaded.value):
            raise UserError(f"--judge {said}: is {loaded.value!r}; a judge is a function of files and labels")
        return lambda files, labels: _check_texts(
            said, calling(said, lambda: loaded.value(files, labels)), len(files))
    try:
        words = shlex.split(said)
    except ValueError as e:
        raise UserError(f"--judge {said!r}: is no command ({e})") from None
    if not words:
        raise UserError("--judge '': name code of your own, FILE.py:NAME, or a command")
    return lambda files, labels: _check_texts(said, _run_judge(words, files, labels), len(files))


def _run_judge(words: list[str], files: Sequence[Path], labels: Sequence[Sequence[str]]) -> list[object]:
    lines = "".join(json.dumps({"file": str(file), "labels": list(of)}, ensure_ascii=False) + "\n"
                    for file, of in zip(files, labels, strict=True))
    try:
        done = subprocess.run(words, input=lines, capture_output=True, encoding="utf-8",
                              timeout=JUDGE_LIMIT_S)
        if done.returncode:
            raise UserError(f"--judge {shlex.join(words)}: ended with code {done.returncode}: "
                            f"{done.stderr.strip()[-300:]}")
        return [json.loads(line) for line in done.stdout.split("\n") if line.strip()]
    except (OSError, subprocess.TimeoutExpired, ValueError) as e:
        raise UserError(f"--judge {shlex.join(words)}: {e}; it reads JSON lines and prints a JSON string for "
                        "each") from None


def _check_texts(said: str, found: object, count: int) -> list[str]:
    if not isinstance(found, (list, tuple)) or len(found) != count \
            or not all(isinstance(text, str) for text in found):
        raise UserError(f"--judge {said}: gave {str(found)[:200]} for {count} files; one text is needed for "
                        "each")
    return list(found)


RECALLS = (1, 5)


@dataclass(frozen=True)
class MediaGroup:
    """Rows that are candidates for each other."""

    rows: list[int]
    answers: list[str]
    """Their answers, each once."""


@dataclass(frozen=True)
class Rank:
    """Where the best right candidate of a question stands."""

    rank: int
    """From 1; wrong candidates that are as good stand before it."""
    num_candidates: int
    num_right: int


def grouped(rows: Sequence[MediaRow], candidates: int, seed: int) -> list[MediaGroup]:
    """Return rows in groups of at most `candidates`, as even as can be, in an order of the seed."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    # Even sizes, so that chance is nearly the same in all groups.
    number = -(-len(rows) // candidates)
    ends = [len(rows) * i // number for i in range(number + 1)]
    parts = [order[start:end] for start, end in pairwise(ends)]
    return [MediaGroup(part, list(dict.fromkeys(rows[i].answer for i in part))) for part in parts]


def ranks(rows: Sequence[MediaRow], groups: Sequence[MediaGroup],
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


def rank_figures(found: Sequence[Rank]) -> dict[str, Any]:
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
    k = min(k, one.num_candidates)
    return 1 - math.comb(one.num_candidates - one.num_right, k) / math.comb(one.num_candidates, k)


def likelihoods(target: Target, rows: Sequence[MediaRow], groups: Sequence[MediaGroup], shown: ShownMedia, *,
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
        UserError: see `generation.prompts.prompts_of`; or a row is longer than the model reads.
    """
    from megatron_sov.infer.asking import check_length
    from megatron_sov.infer.engines.load import run_forward_model
    from megatron_sov.omni.generation.prompts import prompts_of

    # Prompts in the order of groups, which is how the results are cut apart again.
    order = [number for group in groups for number in group.rows]
    prompts = prompts_of(target, [rows[number].content for number in order], shown, chat=chat,
                         with_features=with_features)
    ids = {row.answer: prompts.asker.answer(row.answer) for row in rows}
    longest = max(map(len, prompts.ids)) + max(map(len, ids.values()))
    check_length(target, longest, "the longest prompt and the longest answer", "shorten one of them")

    def work(loaded: Loaded) -> list[list[float]]:
        from megatron_sov.infer.decoder.logprobs import Question, answer_logprobs

        answers = [[ids[answer] for answer in group.answers] for group in groups for _ in group.rows]
        questions = [Question(prompt, of, inputs) for prompt, of, inputs
                     in zip(prompts.ids, answers, prompts.encoder_inputs, strict=True)]
        with work_bar("comparing", len(questions), "prompt", is_first()) as bar:
            told = answer_logprobs(loaded.policy, questions, batching, bar.update)
        return [[math.fsum(tokens) for tokens in of] for of in told]

    found: list[list[float]] | None = run_forward_model(target, list(settings), nproc, work)
    if found is None:
        return None
    told = iter(found)
    return [[next(told) for _ in group.rows] for group in groups]
