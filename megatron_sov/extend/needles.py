"""Needles in an extension: documents that teach retrieval beside the data, and the test before and after."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.config import RunConfig
from megatron_sov.data.token_shards import TEXTS, Source, open_sources, tokenizer_folder
from megatron_sov.data.views import SHORT
from megatron_sov.errors import UserError
from megatron_sov.eval.needle.documents import SOURCE_NAME, NeedleDocuments, needle_source
from megatron_sov.eval.needle.suite import NeedleResult, NeedleSuite, make_suite, run_suite, table
from megatron_sov.eval.needle.text import open_haystacks
from megatron_sov.generate.generator import MegatronEngine
from megatron_sov.train.gate import GateView
from megatron_sov.train.stage_config import tokenizer_of


@dataclass(frozen=True)
class Needles:
    """What an extension trains on beside its data, and what it is judged by."""

    suite: NeedleSuite
    """Held-out text, keys and values kept for tests."""
    data: tuple[Source, ...]
    """The packed data, open."""
    sources: tuple[Source, ...]
    """Documents for training; none where `needle.train_share` is 0 and no blend names them."""

    def before(self, run: GateView) -> None:
        """Judge the model as it will be trained: with stretched rotations,
        if it gets them, before any step."""
        self.record(run, "before", self.measure(run))

    def after(self, run: GateView) -> dict[str, Any]:
        """Judge the trained model; returns what joins the completion manifest."""
        return {"needle": self.record(run, "after", self.measure(run))}

    def measure(self, run: GateView) -> NeedleResult:
        """Judge the model as it is; called by all processes together."""
        return run_suite(self.suite, MegatronEngine(run.policy))

    def record(self, run: GateView, when: str, result: NeedleResult) -> dict[str, Any]:
        """Write a result into the run's events and show it; returns it as plain values."""
        run.events.write("needle", when=when, step=run.step, **result.to_dict())
        if run.world.is_main:
            print(f"needle retrieval {when} the extension\n{table(result)}", flush=True)
        return result.to_dict()


def make_needles(config: RunConfig, start: Path, formats: tuple[str, ...] = TEXTS) -> Needles:
    """Return test and training documents for an extension.

    Args:
        config: resolved settings.
        start: the checkpoint, or Hugging Face folder, it starts from, whose tokenizer serves where none
            travels with the data.
        formats: of data that is learned from; needles are hidden in text alone.

    Raises:
        UserError: the data holds no text to train on or to test by, or the settings make no test.
    """
    needle = config.needle
    data = open_sources(config.data.paths, config.model.vocab_size, formats)
    if SOURCE_NAME in (s.name for s in data):
        raise UserError(f"--data: a source named {SOURCE_NAME!r} is kept for documents made on the fly; "
                        "pack that text under another name (--input NAME=PATH)")
    tokenizer = tokenizer_folder(data) or tokenizer_of(start)
    suite = make_suite(needle, open_haystacks(data, "heldout", tokenizer, languages=needle.languages))
    lengths = _document_lengths(config)
    if not lengths:
        return Needles(suite, tuple(data), ())
    haystacks = open_haystacks(data, "train", tokenizer, languages=needle.languages)
    return Needles(suite, tuple(data), tuple(
        needle_source(NeedleDocuments(haystacks, length, config.train.seed, needle),
                      needle.train_share if name == SOURCE_NAME else 0.0, name)
        for name, length in lengths.items()))


def _document_lengths(config: RunConfig) -> dict[str, int]:
    """Return source -> tokens of its documents: `needle`, as long as the longest phase,
    and `needle/N` where a blend has it.

    Raises:
        UserError: N is not a number.
    """
    named = dict.fromkeys(name for phase in config.data.phases for name in phase.blend)
    lengths: dict[str, int] = {}
    if config.needle.train_share or SOURCE_NAME in named:
        lengths[SOURCE_NAME] = config.data.max_seq_len()
    for name in named:
        base, mark, number = name.partition(SHORT)
        if base == SOURCE_NAME and mark:
            if not number.isdecimal() or int(number) < 1:
                raise UserError(f"data.phases blend {name!r}: after the {SHORT} stands a number of tokens, "
                                f"e.g. {base}{SHORT}4096")
            lengths[name] = int(number)
    return lengths


def with_needles_in_blends(config: RunConfig) -> RunConfig:
    """Return `config` with the share of needle documents in every blend that is spelled out and
    does not name them."""
    share = config.needle.train_share
    if share == 0:
        return config
    phases = tuple(
        dataclasses.replace(p, blend={**p.blend, SOURCE_NAME: sum(p.blend.values()) * share / (1 - share)})
        if p.blend and SOURCE_NAME not in p.blend else p for p in config.data.phases)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, phases=phases))
