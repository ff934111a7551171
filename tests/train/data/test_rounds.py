"""Samples of rollout rounds: exactly a step's documents, whole, at any layout and in any number of rows."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_sov import recipes
from megatron_sov.base.artifacts import create_artifact
from megatron_sov.model.config import PhaseConfig, PolicyConfig, RolloutConfig, RunConfig
from megatron_sov.model.config.run import add_rounds
from megatron_sov.train.data import rounds as rounds_module
from megatron_sov.train.data.order import OrderState, SampleOrder
from megatron_sov.train.data.rounds import PublishedRound, RoundDocuments, build_rounds_source, first_document
from megatron_sov.train.data.rows import BatchStream, compute_micro_batch_rows
from megatron_sov.train.data.token_shards import Source
from megatron_sov.train.data.views import apply_data_phases

LENGTHS = {1: [9, 3, 16, 4, 4, 4], 2: [5, 16, 16, 2]}
STEPS = {1: (range(4), range(4, 6)), 2: (range(1), range(1, 4))}


def config_of(**policy: Any) -> RunConfig:
    base = recipes.get("tiny-solar-open")
    return add_rounds(dataclasses.replace(
        base, policy=PolicyConfig(method="dapo", **policy), rollout=RolloutConfig(
            rounds=2, steps_per_round=2, max_new_tokens=8, max_prompt_tokens=8),
        train=dataclasses.replace(base.train, global_batch_size=4, micro_batch_size=1),
        data=dataclasses.replace(base.data, phases=(PhaseConfig("main", seq_len=16),))))


def opened(numbered: Any, *numbers: int) -> tuple[Source, RoundDocuments]:
    """Return a source of rounds, some of them open."""
    source = build_rounds_source(Path("rounds"), 10**6, None, ["old"])
    documents = source.train_documents
    assert isinstance(documents, RoundDocuments)
    for number in numbers:
        open_round(numbered, documents, number)
    return source, documents


def open_round(numbered: Any, documents: RoundDocuments, number: int) -> None:
    starts = np.concatenate([[0], np.cumsum(LENGTHS[number])])
    made = numbered(LENGTHS[number])
    made.column = lambda name, d, start, count: made.tokens(d, start, count).astype(np.float32)
    beside = {"old": -np.arange(starts[-1], dtype=np.float32)}
    documents.open(number, PublishedRound(Path("rounds"), made, STEPS[number], beside, starts))


def test_a_step_has_exactly_its_whole_documents(numbered: Any) -> None:
    source, _ = opened(numbered, 1, 2)
    order = SampleOrder(config_of(), [source])
    given = [order.next_batch() for _ in range(4)]
    assert [entry.phase for entry, _ in given] == ["round-0001"] * 2 + ["round-0002"] * 2
    for (_, samples), number, step in zip(given, (1, 1, 2, 2), (0, 1, 0, 1), strict=True):
        segments = [s for sample in samples for s in sample.segments]
        wanted = [(first_document(number) + d, 0, LENGTHS[number][d]) for d in STEPS[number][step]]
        assert sorted(tuple(s) for s in segments) == wanted
        assert all(sum(s.count for s in sample.segments) <= 16 for sample in samples)
    assert [len(samples) for _, samples in given] == [2, 1, 1, 3]
    assert order.state.cursors["rollouts"].tokens == sum(map(sum, LENGTHS.values()))


@pytest.mark.each("dp_size", [1, 2, 3])
def test_rows_are_padded_to_equal_counts_per_process(numbered: Any, dp_size: int) -> None:
    source, _ = opened(numbered, 1, 2)
    config = config_of()
    found = []
    for rank in range(dp_size):
        stream = BatchStream(config, SampleOrder(config, [source]), rank, dp_size, 4, ("advantage", "old"))
        found.append([stream.next() for _ in range(4)])
        stream.close()
    for step, batches in enumerate(zip(*found, strict=True)):
        assert {len(b.rows) for b in batches} == {-(-[2, 1, 1, 3][step] // dp_size)}
        assert {b.num_samples for b in batches} == {[2, 1, 1, 3][step]}
        tokens = sum(int((~row.padding).sum()) for b in batches for row in b.rows)
        number = step // 2 + 1
        assert tokens == sum(LENGTHS[number][d] for d in STEPS[number][step % 2])
    # numbers of labels: published ones by the documents, the trainer's own by their place in the round
    row = found[0][1].rows[0]  # documents 4 and 5 of round 1
    at = {origin.segment.document - first_document(1): origin.first for origin in row.origins}
    assert row.columns["old"][at[4]:at[4] + 3].tolist() == [-33.0, -34.0, -35.0]
    assert row.columns["advantage"][at[5]:at[5] + 3].tolist() == [601.0, 602.0, 603.0]


def test_closed_rounds_are_not_prefetched(numbered: Any) -> None:
    source, documents = opened(numbered, 1)
    config = config_of()
    order = SampleOrder(config, [source])
    stream = BatchStream(config, order, 0, 1, 4)
    assert stream.next().num_samples == 2 and stream.next().num_samples == 1
    assert order.state.step == 2 and not order.is_ready(2)
    open_round(numbered, documents, 2)
    assert stream.next().num_samples == 1
    stream.close()


def test_text_steps_are_drawn_and_resume(numbered: Any, make_source: Any) -> None:
    config = config_of(knowledge_coeff=0.1, knowledge_share=0.5, knowledge_batch_size=3)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, seed=1))

    def order(state: OrderState | None = None) -> SampleOrder:
        source, _ = opened(numbered, 1, 2)
        texts = [make_source("a", [7] * 40), make_source("b", [5] * 40, 2.0)]
        return SampleOrder(config, [*texts, source], state)

    whole = order()
    given = [whole.next_batch()[1] for _ in range(4)]
    has_text = [config.policy.has_text_at(1, step) for step in range(1, 5)]
    assert len(set(has_text)) == 2, "draw another seed"
    for samples, drawn in zip(given, has_text, strict=True):
        assert sum(s.source != 2 for s in samples) == (3 if drawn else 0)
        assert [s.source == 2 for s in samples] == sorted((s.source == 2 for s in samples), reverse=True)
    assert whole.ledger.get_entry(0).weights == {"rollouts": 1.0, "a": 1.5 / 4 / 3, "b": 1.5 / 4 * 2 / 3}
    part = order()
    again = [part.next_batch()[1] for _ in range(2)]
    part = order(OrderState.from_dict(part.state.to_dict()))
    again += [part.next_batch()[1] for _ in range(2)]
    assert again == given


def test_a_round_that_is_damaged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(content: dict[str, Any]) -> PublishedRound:
        monkeypatch.setattr(rounds_module, "read_manifest", lambda *_: SimpleNamespace(content=content))
        return RoundDocuments(tmp_path).read(1, 16, 2)

    for content, why in (({}, "is not a published round"),
                         ({"round": 1, "steps": [[0, 2], [3, 1]]}, "are not consecutive"),
                         ({"round": 2, "steps": [[0, 0], [0, 0]]}, "is round 2 with 2 .*, must be round 1")):
        with pytest.raises(Exception, match=f"0001: .*{why}.*published again"):
            read(content)
    assert read({"round": 1, "steps": [[0, 0], [0, 0]]}).documents is None


@pytest.mark.each("together", [1, 2, 6])
def test_micro_batches_of_a_round_have_equal_size_and_little_padding(together: int) -> None:
    for most in range(1, 9):
        for num_rows in range(1, 70):
            size = compute_micro_batch_rows(num_rows, most, together)
            count = -(-num_rows // (size * together)) * together
            fewest = -(-num_rows // (most * together)) * together
            assert 1 <= size <= most and count == fewest
            assert not any(count * less >= num_rows for less in range(1, size)), "no smaller ones would do"
    assert compute_micro_batch_rows(19, 32, 1) == 19 and compute_micro_batch_rows(19, 8, 1) == 7


# Phases that a mix brings along: taken where a phase's own blend is empty or names other sources.


SHARES = {"1": {"en-basic": 0.9, "ko-basic": 0.1}, "2.C": {"ko-L3": 1.0}}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    with create_artifact(tmp_path / "mixed", "tokens") as artifact:
        artifact.content = {"sources": [{"name": n} for n in ("en-basic", "ko-basic", "ko-L3")],
                            "phases": [{"name": name, "tokens": 10, "blend": blend}
                                       for name, blend in SHARES.items()]}
    return tmp_path / "mixed"


def run_on(*paths: Path, phases: tuple[PhaseConfig, ...] | None = None,
           recipe: str = "solar-open-102b") -> RunConfig:
    config = recipes.get(recipe)
    data = dataclasses.replace(config.data, paths={str(path): 1.0 for path in paths},
                               phases=phases or config.data.phases)
    return dataclasses.replace(config, data=data)


def blends(config: RunConfig, recipe: RunConfig | None = None) -> dict[str, dict[str, float]]:
    """Return phase -> blend; the recipe is the settings themselves unless --set has changed it."""
    return {phase.name: dict(phase.blend)
            for phase in apply_data_phases(config, recipe or config).data.phases}


@pytest.mark.parametrize("recipe", ["solar-open-102b", "tiny-solar-open"])
def test_a_recipe_trains_on_the_sources_of_the_mix(mixed: Path, recipe: str) -> None:
    config = run_on(mixed, recipe=recipe)
    result = apply_data_phases(config, config)
    assert {name: blends(config)[name] for name in SHARES} == SHARES
    for phase, own in zip(result.data.phases, config.data.phases, strict=True):
        assert dataclasses.replace(phase, blend=own.blend) == own, "all but the blend stays"
        assert phase.name in SHARES or phase.blend == own.blend
    assert apply_data_phases(result, config) == result, "a run that goes on has the same settings"


def test_a_configured_blend_of_the_sources_is_kept(mixed: Path) -> None:
    own = {"ko-L3@64": 1.0, "en-basic/32": 2.0}
    phases = (PhaseConfig("1", blend=own), PhaseConfig("2.C"), PhaseConfig("main"))
    assert blends(run_on(mixed, phases=phases)) == {"1": own, "2.C": SHARES["2.C"], "main": {}}
