"""Needles in an extension: documents that teach retrieval beside the data, and the test before and after."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.config import RunConfig
from megatron_sov.data.shards import Source, open_sources, tokenizer_folder
from megatron_sov.errors import UserError
from megatron_sov.eval.haystack import open_haystacks
from megatron_sov.eval.needle import NeedleResult, NeedleSuite, make_suite, run_suite, table
from megatron_sov.eval.needle_documents import SOURCE_NAME, NeedleDocuments, needle_source
from megatron_sov.eval.needle_engines import policy_engine
from megatron_sov.train.trainer import Trainer


@dataclass(frozen=True)
class Needles:
    """What an extension trains on beside its data, and what it is judged by."""

    suite: NeedleSuite
    """Held-out text, keys and values kept for tests."""
    sources: tuple[Source, ...]
    """Documents for training; none where `needle.train_share` is 0."""

    def before(self, trainer: Trainer) -> None:
        """Judge the model as it will be trained: with stretched rotations, if it gets them, before any step."""
        self.record(trainer, "before", self.measure(trainer))

    def after(self, trainer: Trainer) -> dict[str, Any]:
        """Judge the trained model; returns what joins the completion manifest."""
        return {"needle": self.record(trainer, "after", self.measure(trainer))}

    def measure(self, trainer: Trainer) -> NeedleResult:
        """Judge the model as it is; called by all processes together."""
        return run_suite(self.suite, policy_engine(trainer.policy))

    def record(self, trainer: Trainer, when: str, result: NeedleResult) -> dict[str, Any]:
        """Write a result into the run's events and show it; returns it as plain values."""
        trainer.events.write("needle", when=when, step=trainer.done.step, **result.to_dict())
        if trainer.world.is_main:
            print(f"needle retrieval {when} the extension\n{table(result)}", flush=True)
        return result.to_dict()


def make_needles(config: RunConfig, start: Path) -> Needles:
    """Return test and training documents for an extension.

    Args:
        config: resolved settings.
        start: the checkpoint it starts from, whose tokenizer serves where none travels with the data.

    Raises:
        UserError: the data holds no text to train on or to test by, or the settings make no test.
    """
    needle = config.needle
    if not 0 <= needle.train_share < 1:
        raise UserError(f"needle.train_share = {needle.train_share}: must lie in [0, 1)")
    data = open_sources(config.data.paths, config.model.vocab_size)
    if SOURCE_NAME in (s.name for s in data):
        raise UserError(f"--data: a source named {SOURCE_NAME!r} is kept for documents made on the fly; "
                        "pack that text under another name (--input NAME=PATH)")
    tokenizer = tokenizer_folder(data) or start / "tokenizer"
    suite = make_suite(needle, open_haystacks(data, "heldout", tokenizer, languages=needle.languages))
    if needle.train_share == 0:
        return Needles(suite, ())
    longest = max(p.seq_len for p in config.data.phases)
    documents = NeedleDocuments(open_haystacks(data, "train", tokenizer), longest, config.train.seed)
    return Needles(suite, (needle_source(documents, needle.train_share),))


def with_needles_in_blends(config: RunConfig) -> RunConfig:
    """Return `config` with the share of needle documents in every blend that is spelled out and does not name them."""
    share = config.needle.train_share
    if share == 0:
        return config
    phases = tuple(
        dataclasses.replace(p, blend={**p.blend, SOURCE_NAME: sum(p.blend.values()) * share / (1 - share)})
        if p.blend and SOURCE_NAME not in p.blend else p for p in config.data.phases)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, phases=phases))
