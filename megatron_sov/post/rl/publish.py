"""From the store to a round that is trained: groups get advantages, and their responses become documents.

A round is published once, by a rename, and never changes: whoever resumes trains what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.artifacts import MANIFEST, manifest_sha256, new_artifact
from megatron_sov.chat.encode import TYPE_PROMPT, TYPE_RESPONSE
from megatron_sov.config import RunConfig
from megatron_sov.data.rounds import ADVANTAGE, BEHAVIOUR, SOURCE, folder_of_round
from megatron_sov.data.routes import shape_of
from megatron_sov.data.token_bytes import token_bytes
from megatron_sov.data.token_shards import CONTENT_VERSION
from megatron_sov.data.vocabulary import TOKENIZER_JSON
from megatron_sov.digests import SHA256, file_digest
from megatron_sov.documents import ROLLOUTS
from megatron_sov.documents.indexed_writer import IndexedWriter
from megatron_sov.documents.routes import ROUTES, RouteShape
from megatron_sov.errors import UserError
from megatron_sov.post.parts.advantages import advantages
from megatron_sov.post.rl.gathering import Gathered, RoundOfStore
from megatron_sov.post.rl.round_means import means_of
from megatron_sov.rollouts.prompts import Prompt, round_prompts
from megatron_sov.rollouts.rows import NOT_WRITTEN, Key, Rollout, later
from megatron_sov.rollouts.store import Store

LEARNS = "learns"
"""Reason that groups which are trained are counted under."""
PREFIX, DTYPE = f"{SOURCE}/train-00000", "int32"
SIDECARS = {"loss": "float32", "type": "uint8", BEHAVIOUR: "float32", ADVANTAGE: "float32"}


@dataclass(frozen=True)
class Publisher:
    """What the rounds of a run are published from."""

    config: RunConfig
    """Of the run, with its rounds."""
    rounds: Path
    """RUN/rounds."""
    store: Path
    """The store; whoever writes the first responses makes it."""
    prompts: Sequence[Prompt]
    """All of them."""
    reward_version: str
    tokenizer: Path
    """Folder of the tokenizer that the model has."""

    def publish(self, number: int) -> str:
        """Publish a round, unless it is; returns what it lacks, or "".

        Raises:
            UserError: the store holds something else, a response is longer than a row or of another
                temperature, or the disk is full.
        """
        out = folder_of_round(self.rounds, number)
        if (out / MANIFEST).is_file():
            return ""
        if not self.store.exists():
            return f"nobody has written to {self.store} yet"
        rollout = self.config.rollout
        ids = [prompt.id for prompt in round_prompts(self.prompts, rollout, number)]
        source = RoundOfStore(self._opened(), number, ids, rollout.piece_prompts, self.reward_version,
                              self.config.policy.missing_share)
        gathered = source.gather()
        if isinstance(gathered, str):
            return gathered
        self._write_round(source, gathered, out)
        return ""

    def _opened(self) -> Store:
        store = Store.open(self.store)
        if store.vocab_size > self.config.model.vocab_size:
            raise UserError(f"{self.store}: its tokenizer has {store.vocab_size} ids, the model only "
                            f"model.vocab_size = {self.config.model.vocab_size}; pass the store that this "
                            "model's policies write to")
        file = self.tokenizer / TOKENIZER_JSON
        if store.tokenizer_digest != file_digest(file, SHA256):
            raise UserError(f"{self.store}: is written in another tokenizer ({store.tokenizer_digest[:24]}) "
                            f"than {file}; pass the store that this model's policies write to")
        return store

    def _write_round(self, source: RoundOfStore, gathered: Gathered, out: Path) -> None:
        chosen = self._chosen(gathered)
        with new_artifact(out, "tokens") as artifact:
            counts = self._write(artifact.path / PREFIX, source, gathered, chosen.advantages)
            artifact.content = {
                "content_version": CONTENT_VERSION, "tokenizer_sha256": source.store.tokenizer_digest,
                "vocab_size": source.store.vocab_size, "dtype": DTYPE, "eod": "none",
                "bos_id": None, "eos_id": None,  # a response begins and ends where its policy had it
                "sources": [_described(counts, self._routes)], "round": gathered.number,
                "steps": chosen.steps, "groups": chosen.reasons,
                "late": [list(key[:2]) for key in gathered.late],
                "unjudged": dict(gathered.unjudged), "reward_version": source.reward_version,
                "temperature": self.config.rollout.temperature,
                "policies": sorted({r.rollout.key.policy for group in gathered.groups for r in group}),
                "store": [{"name": part.name, "rollouts": part.manifest_sha256, "rewards": manifest_sha256(
                    source.store.rewards_path(source.reward_version, part.name))} for part in gathered.parts],
                "means": means_of(gathered, source.store, self.config.rollout)}
            artifact.settings = {"rollout": self.config.to_dict()["rollout"],
                                 "policy": self.config.to_dict()["policy"]}

    @cached_property
    def _routes(self) -> RouteShape | None:
        return shape_of(self.config.model) if self.config.policy.router_replay else None

    @cached_property
    def _bytes_of_token(self) -> np.ndarray:
        return token_bytes(self.tokenizer, self.config.model.vocab_size)

    def _chosen(self, gathered: Gathered) -> _Chosen:
        """Give each step's groups their advantages."""
        rollout, policy = self.config.rollout, self.config.policy
        size = rollout.prompts_per_round // rollout.steps_per_round
        found: dict[Key, float] = {}
        reasons: dict[str, int] = {}
        steps: list[list[int]] = []
        for first in range(0, rollout.prompts_per_round, size):
            groups = gathered.groups[first:first + size]
            judged = advantages([np.array([r.reward for r in group]) for group in groups],
                                [np.array([written_tokens(r.rollout) for r in group]) for group in groups],
                                policy, rollout.max_new_tokens)
            before = len(found)
            for group, said in zip(groups, judged, strict=True):
                reasons[said.reason or LEARNS] = reasons.get(said.reason or LEARNS, 0) + 1
                if not said.reason:
                    found |= {r.rollout.key: float(value)
                              for r, value in zip(group, said.advantages, strict=True)}
            steps.append([before, len(found) - before])
        return _Chosen(found, steps, reasons)

    def _write(self, prefix: Path, source: RoundOfStore, gathered: Gathered,
               chosen: dict[Key, float]) -> dict[str, int]:
        """Write the documents, a piece of the round in memory at a time; returns what they count."""
        counts = dict.fromkeys(("num_documents", "num_tokens", "num_bytes"), 0)
        prefix.parent.mkdir()
        sidecars = SIDECARS | ({ROUTES: self._routes.dtype} if self._routes is not None else {})
        with IndexedWriter(prefix, DTYPE, sidecars) as writer:
            for row in _rows(source, gathered, chosen):
                ids = np.concatenate([row.prompt_tokens, row.tokens])
                self._refuse_other_temperature(row)
                self._refuse_too_long(row, len(ids))
                writer.write(np.array([len(ids)], np.int32), {
                    "bin": ids, **_labels(row, chosen[row.key]), **self._routes_of(row, len(ids))})
                counts["num_documents"] += 1
                counts["num_tokens"] += len(ids)
                counts["num_bytes"] += int(self._bytes_of_token[ids].sum())
        return counts

    def _routes_of(self, row: Rollout, num_tokens: int) -> dict[str, np.ndarray]:
        """Return the sidecar of where a response's tokens went, where that is replayed."""
        if self._routes is None:
            return {}
        where = f"round {row.round}: sample {row.key.sample} of prompt {row.key.prompt}"
        if row.routes is None:
            raise UserError(f"{where} has no routes, and policy.router_replay replays them; write responses "
                            "with an engine that tells them, or leave the setting out")
        if problem := self._routes.problem(row.routes):
            raise UserError(f"{where} {problem}; it was written by another model")
        return {ROUTES: self._routes.of_document(row.routes, num_tokens)}

    def _refuse_other_temperature(self, row: Rollout) -> None:
        ours = self.config.rollout.temperature
        if row.temperature != ours:
            raise UserError(f"round {row.round}: sample {row.key.sample} of prompt {row.key.prompt} was "
                            f"written at temperature {row.temperature:g}, and rollout.temperature = "
                            f"{ours:g}: its log-probabilities would be compared with those of another "
                            "distribution; set it to what they were written with, or pass another --store")

    def _refuse_too_long(self, row: Rollout, num_tokens: int) -> None:
        seq_len = self.config.data.phases[0].seq_len
        if num_tokens > seq_len:
            raise UserError(f"round {row.round}: sample {row.key.sample} of prompt {row.key.prompt} has "
                            f"{num_tokens} tokens with its prompt, and a row data.phases.0.seq_len = "
                            f"{seq_len}; a response is never cut: make rows longer")


@dataclass(frozen=True)
class _Chosen:
    """What is trained of a round."""

    advantages: dict[Key, float]
    """Of each response that is trained."""
    steps: list[list[int]]
    """First document and number of documents of each optimizer step."""
    reasons: dict[str, int]
    """`LEARNS`, or why not -> groups."""


def written_tokens(row: Rollout) -> int:
    """Return the tokens of a response that a policy wrote."""
    return int((row.versions != NOT_WRITTEN).sum())


def _rows(source: RoundOfStore, gathered: Gathered, chosen: dict[Key, float]) -> Iterator[Rollout]:
    """Yield the chosen responses, whole, by prompt and sample."""
    for parts in gathered.pieces():
        rows = later([row for part in parts for row in source.store.read_rollouts(part.name)])
        place = {prompt: i for i, prompt in enumerate(source.prompts)}
        yield from sorted((row for row in rows if row.key in chosen),
                          key=lambda row: (place[row.key.prompt], row.key.sample))


def _labels(row: Rollout, advantage: float) -> dict[str, np.ndarray]:
    """Return the sidecars of a response's document: a number for each token as a label."""
    written = np.concatenate([np.zeros(len(row.prompt_tokens), bool), row.versions != NOT_WRITTEN])
    logprobs = np.concatenate([np.zeros(len(row.prompt_tokens), np.float32), row.logprobs])
    return {"loss": written.astype(np.float32), "type": np.where(written, TYPE_RESPONSE, TYPE_PROMPT),
            BEHAVIOUR: logprobs, ADVANTAGE: np.where(written, advantage, 0.0)}


def _described(counts: dict[str, int], routes: RouteShape | None) -> dict[str, Any]:
    """Return what the manifest says of the source."""
    return {"name": SOURCE, "format": ROLLOUTS, "group_documents": 1, "num_bad": {},
            "sidecars": [*SIDECARS, *([ROUTES] if routes is not None else [])],
            **({ROUTES: routes.record()} if routes is not None else {}),
            "splits": {"train": {"shards": [{"prefix": PREFIX, **counts}], **counts},
                       "heldout": {"shards": [], **dict.fromkeys(counts, 0)}}}
