"""Samples of rollout rounds: exactly a step's documents, whole, at any layout and in any number of rows."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_sov import recipes
from megatron_sov.base.artifacts import create_artifact
from megatron_sov.base.documents.shard_files import CONTENT_VERSION
from megatron_sov.model.config import PhaseConfig, PolicyConfig, RolloutConfig, RunConfig
from megatron_sov.model.config.run import add_rounds
from megatron_sov.train.data import rounds as rounds_module
from megatron_sov.train.data.order import OrderState, SampleOrder
from megatron_sov.train.data.rounds import PublishedRound, RoundDocuments, build_rounds_source, first_document
from megatron_sov.train.data.rows import BatchStream, compute_micro_batch_rows
from megatron_sov.train.data.sources import Source
from megatron_sov.train.data.views import apply_data_phases

LENGTHS = {1: [9, 3, 16, 4, 4, 4], 2: [5, 16, 16, 2]}
"""Round -> lengths of its documents."""
STEPS = {1: (range(4), range(4, 6)), 2: (range(1), range(1, 4))}
"""Round -> documents of each of its two steps."""


def build_config(**policy: Any) -> RunConfig:
    base = recipes.get("tiny-solar-open")
    return add_rounds(dataclasses.replace(
        base, policy=PolicyConfig(method="dapo", **policy), rollout=RolloutConfig(
            rounds=2, steps_per_round=2, max_new_tokens=8, max_prompt_tokens=8),
        train=dataclasses.replace(base.train, global_batch_size=4, micro_batch_size=1),
        data=dataclasses.replace(base.data, phases=(PhaseConfig("main", seq_len=16),))))


def create_source(numbered: Any, *numbers: int) -> tuple[Source, RoundDocuments]:
    """Return a source of rounds with its training documents, after opening the rounds `numbers`."""
    source = build_rounds_source(RoundDocuments(Path("rounds"), 10**6, ["old"]), None)
    documents = source.train_documents
    assert isinstance(documents, RoundDocuments)
    for number in numbers:
        open_round(numbered, documents, number)
    return source, documents


def open_round(numbered: Any, documents: RoundDocuments, number: int) -> None:
    starts = np.concatenate([[0], np.cumsum(LENGTHS[number])])
    shard = numbered(LENGTHS[number])
    shard.column = lambda name, d, start, count: shard.tokens(d, start, count).astype(np.float32)
    trainer_columns = {"old": -np.arange(starts[-1], dtype=np.float32)}
    documents.open(number, PublishedRound(Path("rounds"), shard, STEPS[number], trainer_columns, starts))


def test_a_step_has_exactly_its_whole_documents(numbered: Any) -> None:
    source, _ = create_source(numbered, 1, 2)
    order = SampleOrder(build_config(), [source])
    batches = [order.next_batch() for _ in range(4)]
    assert [entry.phase for entry, _ in batches] == ["round-0001"] * 2 + ["round-0002"] * 2
    for (_, samples), number, step in zip(batches, (1, 1, 2, 2), (0, 1, 0, 1), strict=True):
        segments = [s for sample in samples for s in sample.segments]
        expected = [(first_document(number) + d, 0, LENGTHS[number][d]) for d in STEPS[number][step]]
        assert sorted(tuple(s) for s in segments) == expected
        assert all(sum(s.count for s in sample.segments) <= 16 for sample in samples)
    # rows of 16 tokens: 9+3+4 and 16 | 4+4 | 5 | 16, 16 and 2
    assert [len(samples) for _, samples in batches] == [2, 1, 1, 3]
    assert order.state.cursors["rollouts"].tokens == sum(map(sum, LENGTHS.values()))


@pytest.mark.each("dp_size", [1, 2, 3])
def test_rows_are_padded_to_equal_counts_per_process(numbered: Any, dp_size: int) -> None:
    source, _ = create_source(numbered, 1, 2)
    config = build_config()
    batches_of_rank = []
    for rank in range(dp_size):
        stream = BatchStream(config, SampleOrder(config, [source]), rank, dp_size, 4, ("advantage", "old"))
        batches_of_rank.append([stream.next() for _ in range(4)])
        stream.close()
    for step, batches in enumerate(zip(*batches_of_rank, strict=True)):
        num_samples = [2, 1, 1, 3][step]
        assert {len(b.rows) for b in batches} == {math.ceil(num_samples / dp_size)}
        assert {b.num_samples for b in batches} == {num_samples}
        tokens = sum(int((~row.padding).sum()) for b in batches for row in b.rows)
        number = step // 2 + 1
        assert tokens == sum(LENGTHS[number][d] for d in STEPS[number][step % 2])
    # published columns are read by document, the trainer's own columns by label index in the round
    row = batches_of_rank[0][1].rows[0]  # documents 4 and 5 of round 1
    first_of = {origin.segment.document - first_document(1): origin.first for origin in row.origins}
    # document 4 begins at token 9 + 3 + 16 + 4 = 32 of the round, and its first label is the next token
    assert row.columns["old"][first_of[4]:][:3].tolist() == [-33.0, -34.0, -35.0]
    assert row.columns["advantage"][first_of[5]:][:3].tolist() == [601.0, 602.0, 603.0]


def test_closed_rounds_are_not_prefetched(numbered: Any) -> None:
    source, documents = create_source(numbered, 1)
    config = build_config()
    order = SampleOrder(config, [source])
    stream = BatchStream(config, order, 0, 1, 4)
    assert stream.next().num_samples == 2 and stream.next().num_samples == 1
    assert order.state.step == 2 and not order.is_ready(2)
    open_round(numbered, documents, 2)
    assert stream.next().num_samples == 1
    stream.close()


def test_text_steps_are_drawn_and_resume(numbered: Any, make_source: Any) -> None:
    config = build_config(knowledge_coeff=0.1, knowledge_share=0.5, knowledge_batch_size=3)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, seed=1))

    def create_order(state: OrderState | None = None) -> SampleOrder:
        source, _ = create_source(numbered, 1, 2)
        texts = [make_source("a", [7] * 40), make_source("b", [5] * 40, 2.0)]
        view = make_source("a@6", [7] * 40, 0.0)  # of a blend that rounds do not use
        return SampleOrder(config, [*texts, source, view], state)

    uninterrupted = create_order()
    batches = [uninterrupted.next_batch()[1] for _ in range(4)]
    has_text = [config.policy.has_text_at(1, step) for step in range(1, 5)]
    assert len(set(has_text)) == 2, "draw another seed"
    for samples, expects_text in zip(batches, has_text, strict=True):
        are_rollouts = [sample.source == 2 for sample in samples]
        assert are_rollouts.count(False) == (3 if expects_text else 0)
        assert are_rollouts == sorted(are_rollouts, reverse=True), "rollouts come first"
    assert uninterrupted.ledger.get_entry(0).weights == {"rollouts": 1.0, "a": 1.5 / 4 / 3,
                                                         "b": 1.5 / 4 * 2 / 3}
    order = create_order()
    resumed = [order.next_batch()[1] for _ in range(2)]
    order = create_order(OrderState.from_dict(order.state.to_dict()))
    resumed += [order.next_batch()[1] for _ in range(2)]
    assert resumed == batches


def test_a_damaged_round_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(content: dict[str, Any]) -> PublishedRound:
        monkeypatch.setattr(rounds_module, "read_manifest", lambda *_: SimpleNamespace(content=content))
        return RoundDocuments(tmp_path).read(1, 16, 2)

    for content, why in (({}, "is not a published round"),
                         ({"round": 1, "steps": [[0, 2], [3, 1]]}, "are not consecutive"),
                         ({"round": 2, "steps": [[0, 0], [0, 0]]}, "is round 2 with 2 .*, must be round 1")):
        with pytest.raises(Exception, match=f"0001: .*{why}.*published again"):
            read(content)
    assert read({"round": 1, "steps": [[0, 0], [0, 0]]}).documents is None


@pytest.mark.each("dp_size", [1, 2, 6])
def test_micro_batches_of_a_round_have_equal_size_and_little_padding(dp_size: int) -> None:
    for max_rows in range(1, 9):
        for num_rows in range(1, 70):
            size = compute_micro_batch_rows(num_rows, max_rows, dp_size)
            count = math.ceil(num_rows / (size * dp_size)) * dp_size
            fewest = math.ceil(num_rows / (max_rows * dp_size)) * dp_size
            assert 1 <= size <= max_rows and count == fewest
            assert count * (size - 1) < num_rows, "smaller micro-batches would do"
    assert compute_micro_batch_rows(19, 32, 1) == 19 and compute_micro_batch_rows(19, 8, 1) == 7


# Phases of a data mix replace blends that are empty or name other sources.


SHARES = {"1": {"en-basic": 0.9, "ko-basic": 0.1}, "2.C": {"ko-L3": 1.0}}


@pytest.fixture
def mixed_data(tmp_path: Path) -> Path:
    with create_artifact(tmp_path / "mixed", "tokens") as artifact:
        artifact.content = {"content_version": CONTENT_VERSION, "tokenizer_sha256": "", "vocab_size": 1,
                            "sources": [{"name": n, "format": "text", "splits": {
                                "train": {"num_tokens": 1, "shards": [{"prefix": f"{n}/train-00000"}]}}}
                                for n in ("en-basic", "ko-basic", "ko-L3")],
                            "phases": [{"name": name, "tokens": 10, "blend": blend}
                                       for name, blend in SHARES.items()]}
    return tmp_path / "mixed"


def build_run_config(*paths: Path, phases: tuple[PhaseConfig, ...] | None = None,
                     recipe: str = "solar-open-102b") -> RunConfig:
    config = recipes.get(recipe)
    data = dataclasses.replace(config.data, paths={str(path): 1.0 for path in paths},
                               phases=phases or config.data.phases)
    return dataclasses.replace(config, data=data)


def get_blends(config: RunConfig, recipe: RunConfig | None = None) -> dict[str, dict[str, float]]:
    """Return phase -> blend of a run; `recipe`: the recipe before --set changed it, None: as `config`."""
    return {phase.name: dict(phase.blend)
            for phase in apply_data_phases(config, recipe or config).data.phases}


@pytest.mark.parametrize("recipe", ["solar-open-102b", "tiny-solar-open"])
def test_a_recipe_trains_on_the_sources_of_the_mix(mixed_data: Path, recipe: str) -> None:
    config = build_run_config(mixed_data, recipe=recipe)
    result = apply_data_phases(config, config)
    assert {name: get_blends(config)[name] for name in SHARES} == SHARES
    for phase, original in zip(result.data.phases, config.data.phases, strict=True):
        assert dataclasses.replace(phase, blend=original.blend) == original, "all but the blend stays"
        assert phase.name in SHARES or phase.blend == original.blend
    assert apply_data_phases(result, config) == result, "a resumed run has the same settings"


def test_a_configured_blend_of_the_sources_is_kept(mixed_data: Path) -> None:
    blend = {"ko-L3@64": 1.0, "en-basic/32": 2.0}
    phases = (PhaseConfig("1", blend=blend), PhaseConfig("2.C"), PhaseConfig("main"))
    assert get_blends(build_run_config(mixed_data, phases=phases)) == {"1": blend, "2.C": SHARES["2.C"],
                                                                       "main": {}}
