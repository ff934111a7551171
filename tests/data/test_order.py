"""The order of samples, by brute force over random sources, blends and interruptions."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_sov import recipes
from megatron_sov.config import DataConfig, PhaseConfig, RunConfig
from megatron_sov.data.order import OrderState, Sample, SampleOrder, next_source, resolve_phases
from megatron_sov.data.shards import Source
from megatron_sov.errors import UserError

BATCH = 5


class Lengths:
    """Documents of which only the lengths matter."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, np.int32)


def source(name: str, lengths: list[int], share: float = 1.0, *, is_chat: bool = False) -> Source:
    return Source(name, None, is_chat, {}, {"train": sum(lengths)}, share, made=Lengths(lengths))  # type: ignore[arg-type]


def config(*phases: PhaseConfig, packing: str = "concat", steps: int = 12, seed: int = 1) -> RunConfig:
    base = recipes.get("tiny-solar-open")
    return dataclasses.replace(
        base, data=DataConfig(phases=phases, packing=packing),  # type: ignore[arg-type]
        train=dataclasses.replace(base.train, steps=steps, global_batch_size=BATCH, seed=seed))


def samples(order: SampleOrder, first: int, last: int) -> list[Sample]:
    return [s for step in range(first, last) for s in order.next_batch(step)[1]]


blends = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=9)
corpora = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), min_size=1, max_size=4)


@given(blends, st.integers(1, 300))
@example([0.09, 0.74, 0.74, 0.21, 0.01], 130)  # taking the source that is furthest behind errs by more than a sample here
def test_no_source_is_a_whole_sample_from_its_weight(raw: list[float], num_samples: int) -> None:
    weights = tuple(w / sum(raw) for w in raw)
    taken = [0] * len(weights)
    for n in range(1, num_samples + 1):
        taken[next_source(weights, taken)] += 1
        assert max(abs(weight * n - count) for weight, count in zip(weights, taken, strict=True)) < 1


@given(corpora, st.integers(2, 30), st.integers(0, 99))
@settings(max_examples=60)
def test_running_text_gives_every_token_once_an_epoch_in_order(corpus: list[list[int]], seq_len: int, seed: int) -> None:
    sources = [source(f"s{i}", lengths) for i, lengths in enumerate(corpus)]
    order = SampleOrder(config(PhaseConfig("main", seq_len=seq_len), seed=seed), sources)
    seen: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(corpus))}
    for sample in samples(order, 0, 12):
        assert sum(s.count for s in sample.segments) == seq_len  # no padding
        seen[sample.source] += [(s.document, t) for s in sample.segments for t in range(s.start, s.start + s.count)]
    for i, lengths in enumerate(corpus):
        tokens = sum(lengths)
        for start in range(0, len(seen[i]), tokens):  # each epoch by itself
            epoch = seen[i][start:start + tokens]
            assert max(Counter(epoch).values()) == 1
            if len(epoch) == tokens:
                assert set(epoch) == {(d, t) for d, n in enumerate(lengths) for t in range(n)}
            for (d, t), (d2, t2) in pairwise(epoch):
                assert (d2, t2) == (d, t + 1) if d == d2 else (t == lengths[d] - 1 and t2 == 0)
    assert sum(order.consumed_tokens().values()) == 12 * BATCH * seq_len


@given(corpora, st.integers(40, 60), st.booleans())
@settings(max_examples=60)
def test_whole_documents_are_never_cut_and_none_is_ahead_of_another(corpus: list[list[int]], seq_len: int, is_chat: bool) -> None:
    sources = [source(f"s{i}", lengths, is_chat=is_chat) for i, lengths in enumerate(corpus)]
    order = SampleOrder(config(PhaseConfig("main", seq_len=seq_len), packing="concat" if is_chat else "whole"), sources)
    seen: dict[int, Counter[int]] = {i: Counter({d: 0 for d, n in enumerate(lengths) if n}) for i, lengths in enumerate(corpus)}
    for sample in samples(order, 0, 12):
        assert 0 < sum(s.count for s in sample.segments) <= seq_len
        for segment in sample.segments:
            assert (segment.start, segment.count) == (0, corpus[sample.source][segment.document])
            seen[sample.source][segment.document] += 1
    for i, times in seen.items():
        if sum(s.num_tokens["train"] for s in sources[i:i + 1]):
            assert max(times.values()) - min(times.values()) <= 1


@given(corpora, st.integers(1, 11), st.booleans(), st.data())
@settings(max_examples=40)
def test_a_run_killed_at_any_step_goes_on_as_if_it_had_not_been(corpus: list[list[int]], killed: int, whole: bool,
                                                                data: st.DataObject) -> None:
    blend = {f"s{i}": data.draw(st.floats(0.1, 1.0)) for i in range(len(corpus))}
    settings_ = config(PhaseConfig("a", 0.5, seq_len=16), PhaseConfig("b", 0.5, blend, seq_len=24),
                       packing="whole" if whole else "concat")
    sources = [source(f"s{i}", lengths, share=1 / len(corpus)) for i, lengths in enumerate(corpus)]
    uninterrupted = samples(SampleOrder(settings_, sources), 0, 12)
    order = SampleOrder(settings_, sources)
    before = samples(order, 0, killed)
    state = OrderState.from_dict(json.loads(json.dumps(order.state.to_dict())))
    after = samples(SampleOrder(settings_, sources, state), killed, 12)
    assert before + after == uninterrupted


def test_a_later_phase_goes_on_behind_what_an_earlier_one_took() -> None:
    lengths = [7] * 40
    phases = (PhaseConfig("short", 1, seq_len=7), PhaseConfig("long", 1, seq_len=14))
    order = SampleOrder(config(*phases, steps=4), [source("web", lengths)])
    taken = [s.document for sample in samples(order, 0, 4) for s in sample.segments]
    assert len(taken) == len(set(taken)) == 2 * BATCH + 2 * BATCH * 2


def test_phases_share_out_the_steps() -> None:
    phases = resolve_phases(config(PhaseConfig("a", 10.8), PhaseConfig("b", 5.3), PhaseConfig("c", 3.9), steps=200),
                            [source("web", [9])])
    assert [(p.first_step, p.last_step) for p in phases] == [(0, 108), (108, 161), (161, 200)]


def test_an_empty_blend_takes_each_artifacts_share() -> None:
    sources = [source("web", [9], 0.6), source("code", [9], 0.2)]
    assert resolve_phases(config(PhaseConfig("main")), sources)[0].weights == pytest.approx((0.75, 0.25))


@pytest.mark.parametrize(("blend", "said"), [
    ({"wbe": 1.0}, "names source 'wbe', which the data does not have; did you mean 'web'"),
    ({"web": 1.0, "empty": 0.5}, "gives source 'empty' the weight 0.5, but it has no training tokens"),
])
def test_a_blend_that_the_data_cannot_give_is_refused(blend: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        resolve_phases(config(PhaseConfig("main", blend=blend)), [source("web", [9]), source("empty", [])])
