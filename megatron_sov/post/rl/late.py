"""Responses that came after their round was published: each joins a round that is published later, once,
with the advantage that its own group gives it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_sov.artifacts import MANIFEST, read_manifest
from megatron_sov.data.rounds import folder_of_round
from megatron_sov.post.rl.gathering import LIGHT, Response, RoundOfStore
from megatron_sov.rollouts.parts import Part
from megatron_sov.rollouts.rows import UNFINISHED, Key, Rollout
from megatron_sov.rollouts.store import Store

LATE, LATE_FROM = "late", "late_from"
"""In a round's manifest: what was left out of it, as [prompt, sample]; and what of earlier rounds has joined
it, as [round, prompt, sample, why it is not learned, or ""]."""


@dataclass(frozen=True)
class LateGroup:
    """Late responses to one prompt that have been judged since, with all others of their group."""

    number: int
    """Round that they were written for, from 1."""
    group: tuple[Response, ...]
    """All responses of the group that have a reward, by sample: what the late ones are compared with."""
    joining: Mapping[Key, Part]
    """Late responses that have a reward, with the parts that they stand in."""
    without: Mapping[Key, str]
    """Late responses that the reward has looked at and not judged -> its status."""


def late_groups(rounds: Path, source: RoundOfStore) -> list[LateGroup]:
    """Return what may join a round, by round and in the order in which it was left out.

    Args:
        rounds: RUN/rounds, with the rounds before it.
        source: of the round that is to be published.

    Raises:
        UserError: a manifest or a part cannot be read.
    """
    return [group for number, waiting in _waiting(rounds, source.number).items() if waiting
            for group in _judged_since(replace(source, number=number), waiting)]


def late_rows(store: Store, groups: Sequence[LateGroup]) -> Iterator[Rollout]:
    """Yield the late responses of groups, whole, a part in memory at a time."""
    parts = {part.name: part for group in groups for part in group.joining.values()}
    keys = {(part.name, key) for group in groups for key, part in group.joining.items()}
    for name in parts:
        yield from (row for row in store.read_rollouts(name) if (name, row.key) in keys)


def _waiting(rounds: Path, before: int) -> dict[int, list[tuple[str, int]]]:
    """Return what was left out of each published round and has joined none yet: prompts and samples."""
    found: dict[int, list[tuple[str, int]]] = {}
    joined: set[tuple[int, str, int]] = set()
    for number in range(1, before):
        folder = folder_of_round(rounds, number)
        if (folder / MANIFEST).is_file():
            content = read_manifest(folder, "tokens").content
            found[number] = [(prompt, sample) for prompt, sample in content.get(LATE, ())]
            joined |= {(first, prompt, sample) for first, prompt, sample, _ in content.get(LATE_FROM, ())}
    return {number: [late for late in left_out if (number, *late) not in joined]
            for number, left_out in found.items()}


def _judged_since(source: RoundOfStore, waiting: Sequence[tuple[str, int]]) -> Iterator[LateGroup]:
    """Yield the groups of a round with late responses that the reward has looked at."""
    store, parts = source.store, source.store.rollout_parts(source.number)
    last: dict[Key, tuple[Rollout, Part]] = {}
    for part in sorted(parts, key=lambda part: part.attempt):
        last |= {row.key: (row, part) for row in store.read_rollouts(part.name, LIGHT)}
    judged = source.judged([part for part in parts if store.has_rewards(source.reward_version, part.name)])
    said = {row.key: judged[row.key, row.attempt] for row, _ in last.values()
            if row.finish_reason != UNFINISHED and (row.key, row.attempt) in judged}
    for prompt in dict.fromkeys(prompt for prompt, _ in waiting):
        late = [key for key in said if key.prompt == prompt and (prompt, key.sample) in waiting]
        group = tuple(Response(last[key][0], said[key]) for key in sorted(said, key=lambda key: key.sample)
                      if key.prompt == prompt and said[key].reward is not None)
        if late:
            yield LateGroup(source.number, group,
                            {key: last[key][1] for key in late if said[key].reward is not None},
                            {key: said[key].status for key in late if said[key].reward is None})
