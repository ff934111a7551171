"""Responses of rounds to read, as a page: some with the highest and the lowest rewards, some that were cut
off, and some that have no reward."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sov.base.errors import visible
from megatron_sov.base.pages.page import Chapter, PageSection, PageTable, render
from megatron_sov.judge.rollouts.rows import LENGTH, RewardRow, Rollout
from megatron_sov.judge.rollouts.store import RolloutStore

CUT_OFF = (LENGTH, "turns", "tokens", "unended")
"""Finish reasons of what a limit ended; the last three are those of episodes, see `tools.episode.ENDS`."""
MAX_CHARS = 20_000
"""Of one thing said."""
_COLUMNS = ("record", "tokens", "versions", "finish_reason", "response")
Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class _Read:
    """A response and what was said of it."""

    row: Rollout
    judged: RewardRow | None

    @property
    def reward(self) -> float | None:
        return None if self.judged is None else self.judged.reward

    @property
    def is_cut(self) -> bool:
        return self.row.finish_reason in CUT_OFF

    @property
    def place(self) -> tuple[int, str]:
        """Order among equals: first of each prompt the first sample, so that few show many prompts."""
        return self.row.key.sample, self.row.key.prompt


@dataclass
class _TranscriptRound:
    """What is shown of a round; no more of its responses is in memory at a time than of one piece."""

    number: int
    most: int
    rows: int = 0
    rewards: int = 0
    total: float = 0.0
    cut_off: int = 0
    highest: list[_Read] = field(default_factory=list)
    lowest: list[_Read] = field(default_factory=list)
    cut: list[_Read] = field(default_factory=list)
    without: list[_Read] = field(default_factory=list)

    def add(self, found: Sequence[_Read]) -> None:
        """Count responses, and keep those that are to be shown."""
        scored = [(read, read.reward) for read in found if read.reward is not None]
        self.rows += len(found)
        self.rewards += len(scored)
        self.total += sum(reward for _, reward in scored)
        cut = [read for read in found if read.is_cut]
        self.cut_off += len(cut)
        judged = [read for read, _ in scored]
        self.highest = self._kept([*self.highest, *judged], -1)
        # twice as many, since those that are among the highest are left out in the end
        self.lowest = self._kept([*self.lowest, *judged], 1, 2 * self.most)
        self.cut = sorted([*self.cut, *cut], key=lambda read: read.place)[:self.most]
        without = [read for read in found if read.reward is None]
        self.without = sorted([*self.without, *without], key=lambda read: read.place)[:self.most]

    def _kept(self, reads: list[_Read], sign: int, most: int | None = None) -> list[_Read]:
        return sorted(reads, key=lambda read: (sign * (read.reward or 0.0), read.place))[:most or self.most]

    def shown(self) -> Iterator[tuple[str, _Read]]:
        above = {read.row.key for read in self.highest}
        lowest = [read for read in self.lowest if read.row.key not in above][:self.most]
        for why, reads in (("highest reward", self.highest), ("lowest reward", lowest),
                           ("cut off", self.cut), ("no reward", self.without)):
            for read in reads:
                yield why, read

    def figures(self) -> list[str]:
        mean = f"{self.total / self.rewards:.4f}" if self.rewards else ""
        return [f"{self.number}", f"{self.rows:,}", mean, f"{self.cut_off:,}",
                f"{self.rows - self.rewards:,}"]


def page_of(store: RolloutStore, rounds: Sequence[int], version: str | None, most: int,
            decode: Decode | None = None) -> str:
    """Return the page of responses.

    A response that another attempt goes on behind is shown as the last attempt left it.

    Args:
        store: to look at.
        rounds: which, in the order of the page.
        version: of the reward by which responses are chosen; None: none has one.
        most: responses of each kind and round.
        decode: from token ids to text, with special tokens; tells what a model wrote from what tools said.
    """
    found = [_round(store, number, version, most) for number in rounds]
    chapters = [_chapter(f"Round {part.number}, {why}", read, decode)
                for part in found for why, read in part.shown()]
    table = PageTable(["round", "responses", "mean reward", "cut off", "no reward"],
                      [part.figures() for part in found])
    told = "no reward" if version is None else f"reward {version}"
    return render("Rollouts", str(store.path), f"{told}; up to {most:,} responses of each kind", chapters,
                  overview=("Rounds", table), anchor="response", nothing="Nothing was said.")


def _round(store: RolloutStore, number: int, version: str | None, most: int) -> _TranscriptRound:
    found = _TranscriptRound(number, most)
    for parts, rows, _ in store.pieces(store.parts(number), _COLUMNS):
        said = {} if version is None else store.judgements(version, parts)
        found.add([_Read(row, said.get((row.key, row.attempt))) for row in rows])
    return found


def _chapter(name: str, read: _Read, decode: Decode | None) -> Chapter:
    row, judged = read.row, read.judged
    written = row.written_versions
    reward = judged.status if judged is not None and judged.reward is None else (
        "none" if judged is None or judged.reward is None else f"{judged.reward:g}")
    steps = "" if not len(written) else f"{written.min()}" if written.min() == written.max() else (
        f"{written.min()} to {written.max()}")
    figures = [("reward", reward, "" if judged is None else _plain(judged.reason)),
               *((_plain(part), _plain(str(value)), "") for part, value in
                 ({} if judged is None else judged.components).items()),
               ("end", row.finish_reason, ""), ("tokens", f"{len(row.tokens):,}", ""),
               ("weights of step", steps, "")]
    turns = [*_asked(row.record), *_said(row, decode)]
    record = json.dumps(dict(row.record), indent=1, ensure_ascii=False)
    return Chapter(name, f"prompt {row.key.prompt}, sample {row.key.sample}", figures, [
        PageSection("Transcript", turns=[(_plain(who), _plain(text)) for who, text in turns]),
        PageSection("Record", json=_plain(record))])


def _asked(record: Any) -> list[tuple[str, str]]:
    given = record.get("messages", record.get("prompt", record.get("question", "")))
    if isinstance(given, list):
        return [(str(message.get("role", "")), str(message.get("content", ""))) for message in given
                if isinstance(message, dict)]
    return [("user", str(given))]


def _said(row: Rollout, decode: Decode | None) -> list[tuple[str, str]]:
    """Return what stands behind the prompt, in turns where their texts can be told."""
    if decode is None:
        return [("model" if row.is_written.all() else "model and tools", row.response)]
    found, place = [], 0
    for start, end in [*row.spans, (len(row.tokens), len(row.tokens))]:
        found += [(who, decode(row.tokens[first:last].tolist()))
                  for who, first, last in (("tools and template", place, start), ("model", start, end))
                  if last > first]
        place = end
    return found


def _plain(text: str) -> str:
    """Return a stranger's text as a page can hold it: without control characters and halves of pairs."""
    more = len(text) - MAX_CHARS
    text = visible(text[:MAX_CHARS]) + (f"\n[{more:,} more characters]" if more > 0 else "")
    return text.encode("utf-8", "replace").decode()
