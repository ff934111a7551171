"""The sample order against brute force, over random sources, curricula and interruptions."""

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from megatron_sov import recipes
from megatron_sov.model.config import DataConfig, PhaseConfig, RunConfig, TrainConfig
from megatron_sov.train.data import streams
from megatron_sov.train.data.ledger import Ledger, LedgerEntry
from megatron_sov.train.data.order import OrderedSample, OrderState, SampleOrder, choose_source
from megatron_sov.train.data.sources import Source, open_sources

Steps = list[tuple[LedgerEntry, list[OrderedSample]]]
MakeSource = Callable[..., Source]
Settings = tuple[RunConfig, list[Source]]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "WINDOW_DOCUMENTS", 13)


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=9), st.integers(1, 300))
# With these weights, choosing the source with the largest deficit would err by more than a sample.
@example([0.09, 0.74, 0.74, 0.21, 0.01], 130)
def test_each_source_is_within_one_sample_of_its_weight(raw_weights: list[float], num_samples: int) -> None:
    weights = {str(i): w / sum(raw_weights) for i, w in enumerate(raw_weights)}
    num_taken: dict[str, int] = dict.fromkeys(weights, 0)
    for n in range(1, num_samples + 1):
        num_taken[choose_source(weights, num_taken)] += 1
        assert max(abs(weight * n - num_taken[name]) for name, weight in weights.items()) < 1


class RandomRun:
    """Random sources and settings, all drawn from a seed."""

    def __init__(self, seed: int, make: MakeSource) -> None:
        self.random = random.Random(seed)
        self._make_source = make
        self.packing = self.random.choice(["best_fit", "concat"])
        self.steps = self.random.randint(6, 40)

    def sources(self, names: str) -> list[Source]:
        """Return sources with random document lengths, weights and kinds."""
        draw, sources = self.random, []
        for name in names:
            lengths = [draw.choice([0, 1, 5, 9, 17, 40]) for _ in range(draw.randint(3, 60))]
            sources.append(self._make_source(name, [*lengths, 7], draw.random() + 0.1,
                                             is_chat=draw.random() < 0.3))
        return sources

    def settings(self, names: str) -> RunConfig:
        """Return phases with random lengths, batch sizes and blends of the named sources; some runs have a
        batch-size ramp or skipped steps."""
        draw = self.random
        phases = tuple(
            PhaseConfig(str(i), share=draw.random() + 0.1, seq_len=draw.choice([8, 16, 33]),
                        global_batch_size=draw.choice([0, 2, 5]),
                        blend={name: draw.random() + 0.01 for name in names if draw.random() < 0.8})
            for i in range(draw.randint(1, 4)))
        first = draw.randint(1, self.steps)
        train = TrainConfig(steps=self.steps, global_batch_size=draw.choice([1, 4, 7]),
                            ramp_from_batch_size=draw.choice([0, 1]), ramp_increment=draw.choice([1, 2]),
                            ramp_steps=6)
        data = DataConfig(phases=phases, packing=self.packing,  # type: ignore[arg-type]
                          skip_steps=draw.choice([(), ((first, first + 2),)]))
        return dataclasses.replace(recipes.get("tiny-solar-open"), train=train, data=data)

    def kills(self) -> list[int]:
        """Return the steps before which the run is killed; as all methods, draws anew at each call."""
        return sorted({self.random.randint(1, self.steps - 1) for _ in range(4)})


def take_steps(steps: int, initial: Settings, resumed: dict[int, Settings]) -> tuple[SampleOrder, Steps]:
    """Take all steps; before the steps in `resumed`, store the state as JSON and resume with new settings."""
    order, steps_taken = SampleOrder(*initial), []
    for step in range(steps):
        if step in resumed:
            order = SampleOrder(*resumed[step],
                                OrderState.from_dict(json.loads(json.dumps(order.state.to_dict()))))
        steps_taken.append(order.next_batch())
    return order, steps_taken


def run_with_kills(seed: int, make: MakeSource) -> tuple[SampleOrder, Steps]:
    """Take the steps of a run that is killed several times, each time resumed with other settings, and with
    an additional source from the first resume on."""
    random_run = RandomRun(seed, make)
    sources, (added,) = random_run.sources("abc"), random_run.sources("d")
    initial = (random_run.settings("abc"), sources)
    resumed = {step: (random_run.settings("abcd"), [*sources, added]) for step in random_run.kills()}
    return take_steps(random_run.steps, initial, resumed)


@pytest.mark.each("seed", range(12))
def test_a_run_killed_at_any_step_resumes_identically(seed: int, make_source: MakeSource) -> None:
    random_run = RandomRun(seed, make_source)
    settings = (random_run.settings("abc"), random_run.sources("abc"))
    _, interrupted = take_steps(random_run.steps, settings, dict.fromkeys(random_run.kills(), settings))
    _, uninterrupted = take_steps(random_run.steps, settings, {})
    assert interrupted == uninterrupted


@pytest.mark.each("seed", range(12))
def test_the_order_is_a_function_of_seed_and_ledger(seed: int, make_source: MakeSource) -> None:
    """The last ledger alone reproduces the samples of several restarts with changed settings."""
    order, steps = run_with_kills(seed, make_source)
    history = json.loads(json.dumps(order.state.to_dict()))["history"]
    config = dataclasses.replace(
        recipes.get("tiny-solar-open"), train=TrainConfig(steps=len(steps)),
        data=DataConfig(packing=order._packing))  # type: ignore[arg-type]
    recomputed = SampleOrder(config, order.sources)
    recomputed.ledger = Ledger([LedgerEntry(**entry) for entry in history])
    assert [recomputed.next_batch() for _ in steps] == steps


@pytest.mark.each("seed", range(12))
def test_each_token_occurs_once_per_epoch_despite_changes(seed: int, make_source: MakeSource) -> None:
    """With changed blends, lengths, batches and skips, and an added source, each token occurs once in each
    complete epoch, and at most once in the current epoch."""
    order, steps = run_with_kills(seed, make_source)
    occurrences: dict[str, Counter[tuple[int, int]]] = {s.name: Counter() for s in order.sources}
    for entry, samples in steps:
        assert len(samples) == entry.global_batch_size
        for sample in samples:
            source = order.sources[sample.source]
            assert entry.weights[source.name] > 0
            assert 0 < sum(s.count for s in sample.segments) <= entry.seq_len
            for s in sample.segments:
                occurrences[source.name].update((s.document, t) for t in range(s.start, s.start + s.count))
                if source.is_chat:
                    assert (s.start, s.count) == (0, min(entry.seq_len, get_lengths(source)[s.document]))
    for source in order.sources:
        epochs = order.state.cursors[source.name].epoch if source.name in order.state.cursors else 0
        counts, lengths = occurrences[source.name], get_lengths(source)
        assert set(counts) <= {(d, t) for d, n in enumerate(lengths) for t in range(n)}
        assert max(counts.values(), default=0) <= epochs + 1
        # Conversations longer than a row are truncated; 8 tokens, the shortest row, are read in any case.
        required_tokens = [(document, position) for document, length in enumerate(lengths)
                           for position in range(min(length, 8) if source.is_chat else length)]
        assert min((counts[token] for token in required_tokens), default=0) >= epochs


def get_lengths(source: Source) -> list[int]:
    return np.asarray(source.open_split("train").lengths).tolist()


@pytest.mark.each("seed", range(12))
def test_every_entry_has_the_samples_of_its_weights(seed: int, make_source: MakeSource) -> None:
    order, steps = run_with_kills(seed, make_source)
    counts: Counter[str] = Counter()
    weights: dict[str, float] = {}
    for entry, samples in steps:
        if entry.weights != weights:
            counts, weights = Counter(), entry.weights
        counts.update(order.sources[s.source].name for s in samples)
        assert all(abs(counts[name] - weight * counts.total()) < 1 for name, weight in weights.items())


def test_heldout_documents_never_occur(packed_data: Any) -> None:
    """Two epochs of real shards contain every training document twice, and no held-out document."""
    sources = open_sources({str(packed_data.text): 1.0, str(packed_data.chats): 1.0}, 368)
    config = dataclasses.replace(recipes.get("tiny-solar-open"),
                                 data=DataConfig(phases=(PhaseConfig("main", seq_len=512),)),
                                 train=TrainConfig(steps=10**6, global_batch_size=1))
    order = SampleOrder(config, sources)
    occurrences: dict[str, Counter[bytes]] = {s.name: Counter() for s in sources}

    def get_epoch(source: Source) -> int:
        cursors = order.state.cursors
        return cursors[source.name].epoch if source.name in cursors else 0

    while min(map(get_epoch, sources)) < 2:
        for sample in order.next_batch()[1]:
            source = sources[sample.source]
            if get_epoch(source) < 2:
                occurrences[source.name].update(source.open_split("train").tokens(*s).tobytes()
                                                for s in sample.segments)
    for source in sources:
        splits = {name: [source.open_split(name).tokens(d, 0, n).tobytes()
                         for d, n in enumerate(source.open_split(name).lengths)]
                  for name in ("train", "heldout")}
        assert splits["heldout"] and not set(occurrences[source.name]) & set(splits["heldout"])
        assert occurrences[source.name] == Counter(splits["train"] * 2)
