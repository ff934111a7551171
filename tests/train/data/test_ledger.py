"""The ledger: planned phases from the settings, and recorded events."""

import dataclasses
from collections.abc import Callable

import pytest

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.model.config import DataConfig, PhaseConfig, RunConfig, TrainConfig
from megatron_sov.train.data.ledger import Ledger, LedgerEntry, plan_ledger
from megatron_sov.train.data.sources import Source

MakeSource = Callable[..., Source]


def build_config(*phases: PhaseConfig, skip_steps: tuple[tuple[int, int], ...] = (),
                 **train: int) -> RunConfig:
    return dataclasses.replace(recipes.get("tiny-solar-open"),
                               data=DataConfig(phases=phases, skip_steps=skip_steps),
                               train=TrainConfig(**{"steps": 20, "global_batch_size": 8, **train}))


@pytest.fixture
def sources(make_source: MakeSource) -> list[Source]:
    return [make_source("web", [9], 0.6), make_source("code", [9], 0.2), make_source("empty", [], 0.2)]


def list_steps(entries: list[LedgerEntry]) -> list[tuple[int, str, int, bool]]:
    return [(e.first_step, e.phase, e.global_batch_size, e.skip) for e in entries]


def test_phases_ramp_and_skips_by_hand(sources: list[Source]) -> None:
    """The ramp counts from the start of the run and continues in the second phase, which has another full
    size."""
    result = plan_ledger(build_config(PhaseConfig("a"), PhaseConfig("b", global_batch_size=6),
                                      skip_steps=((3, 4), (12, 12)), ramp_from_batch_size=2, ramp_increment=2,
                                      ramp_steps=12), sources)
    assert list_steps(result) == [(0, "a", 2, False), (2, "a", 2, True), (4, "a", 4, False),
                                  (8, "a", 6, False),
                                  (10, "b", 6, False), (11, "b", 6, True), (12, "b", 6, False)]


def test_an_empty_blend_weights_sources_by_tokens(sources: list[Source]) -> None:
    (entry,) = plan_ledger(build_config(PhaseConfig("main")), sources)
    assert entry.weights == pytest.approx({"web": 0.75, "code": 0.25})


def test_a_blend_is_normalised_and_a_weight_of_zero_leaves_out(sources: list[Source]) -> None:
    (entry,) = plan_ledger(build_config(PhaseConfig("main", blend={"code": 3.0, "web": 1.0, "empty": 0.0})),
                           sources)
    assert entry.weights == {"web": 0.25, "code": 0.75}


def test_a_phase_too_short_for_a_step_leaves_no_trace(sources: list[Source]) -> None:
    result = plan_ledger(build_config(PhaseConfig("a", share=99), PhaseConfig("b", share=0.1),
                                      PhaseConfig("c", share=50),
                                      steps=3), sources)
    assert list_steps(result) == [(0, "a", 8, False), (2, "c", 8, False)]


@pytest.mark.parametrize(("blend", "message"), [
    ({"wbe": 1.0}, "names source 'wbe', which the data does not have; did you mean 'web'"),
    ({"web": 1.0, "empty": 0.5}, "gives source 'empty' the weight 0.5, but it has no training tokens"),
])
def test_a_blend_that_the_data_cannot_give_is_refused(blend: dict[str, float], message: str,
                                                      sources: list[Source]) -> None:
    with pytest.raises(UserError, match=message):
        plan_ledger(build_config(PhaseConfig("main", blend=blend)), sources)


def test_data_without_tokens_is_refused(make_source: MakeSource) -> None:
    with pytest.raises(UserError, match=r"data\.phases\.0 \(main\): none"):
        plan_ledger(build_config(PhaseConfig("main")), [make_source("empty", [])])


def build_entry(first_step: int, phase: str = "a", seq_len: int = 64) -> LedgerEntry:
    return LedgerEntry(first_step, phase, seq_len, 8, {"web": 1.0})


def test_unchanged_settings_leave_the_ledger_as_it_was() -> None:
    planned = [build_entry(0), build_entry(10, "b")]
    for step in range(15):
        resumed = Ledger(planned, Ledger(planned).history(step), step)
        assert resumed.entries == planned


def test_changed_settings_apply_from_the_resumed_step() -> None:
    first = Ledger([build_entry(0), build_entry(10, "b")])
    second = Ledger([build_entry(0, seq_len=32), build_entry(6, "c")], first.history(4), 4)
    assert second.entries == [build_entry(0), build_entry(4, seq_len=32), build_entry(6, "c")]
    assert ([second.get_entry(s) for s in (0, 3, 4, 5, 6, 99)]
            == [build_entry(0)] * 2 + [build_entry(4, seq_len=32)] * 2 + [build_entry(6, "c")] * 2)
    third = Ledger([build_entry(0)], second.history(12), 12)
    assert third.entries == [build_entry(0), build_entry(4, seq_len=32), build_entry(6, "c"), build_entry(12)]
    assert third.max_seq_len() == 64


def test_history_records_settings_of_earlier_steps() -> None:
    ledger = Ledger([build_entry(0), build_entry(10, "b")])
    assert [len(ledger.history(s)) for s in (0, 1, 10, 11)] == [0, 1, 1, 2]


def test_later_skipped_steps_are_recorded_like_configured_ones() -> None:
    first, second = LedgerEntry(0, "a", 32, 8, {"x": 1.0}), LedgerEntry(10, "b", 64, 8, {"x": 1.0})
    ledger = Ledger([first, second])
    ledger.skip_steps(4, 5)
    ledger.skip_steps(8, 12)
    ledger.skip_steps(5, 6)
    assert [(e.first_step, e.phase, e.skip) for e in ledger.entries] == [
        (0, "a", False), (4, "a", True), (6, "a", False), (8, "a", True), (10, "b", True), (12, "b", False)]
    assert Ledger([first, second], ledger.history(12), 12).entries == ledger.entries, (
        "a resumed run has the same past")
