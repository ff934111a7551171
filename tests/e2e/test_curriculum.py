"""A curriculum from its recipe to the last step: every phase, a ramp, skipped steps,
a source that comes in mid-run."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.cli import main
from megatron_sov.model.config import RunConfig, from_dict
from megatron_sov.runs.obs.events import read_events
from megatron_sov.schedules import Schedule
from megatron_sov.train.data.token_shards import open_sources

STEPS, SEQ_LEN, LONG_SEQ_LEN = 16, 32, 64
SETTINGS = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4",
            "model.num_kv_heads=2", "model.head_dim=8", "model.expert_ffn_dim=16", "model.num_experts=4",
            "data.heldout_tokens=128",
            f"train.steps={STEPS}", "train.global_batch_size=8", "train.micro_batch_size=2",
            "train.ramp_from_batch_size=4", "train.ramp_increment=2", "train.ramp_steps=4",
            "train.checkpoint_every_steps=8", "train.keep_checkpoints=0", "train.eval_every_steps=0",
            "optim.warmup_steps=3",
            "data.skip_steps=[[6, 7]]", 'data.phases.1.blend={"even": 3, "odd@60": 1}',
            f"data.phases.1.seq_len={LONG_SEQ_LEN}")
OF_RECIPE = {"tiny-solar-open": (),
             "tiny-k-exaone": ("model.dense_ffn_dim=48", "model.sliding_window_tokens=8")}


def pretrain(recipe: str, run: Path, *arguments: str) -> None:
    phases = [f"data.phases.{i}.seq_len={SEQ_LEN}" for i in range(len(recipes.get(recipe).data.phases))]
    chosen = [part for s in (*phases, *SETTINGS, *OF_RECIPE[recipe]) for part in ("--set", s)]
    assert main(["pretrain", recipe, "--run", str(run), *arguments, *chosen]) == 0


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_events(run / "events.jsonl") if e["event"] == kind]


def spans(config: RunConfig) -> list[tuple[str, range]]:
    starts = [*config.phase_starts(), STEPS]
    return [(p.name, range(first, last))
            for p, (first, last) in zip(config.data.phases, itertools.pairwise(starts), strict=True)]


@pytest.mark.deep
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("recipe", [
    pytest.param(name, marks=[pytest.mark.deep] * (name != "tiny-k-exaone")) for name in OF_RECIPE])
def test_every_phase_of_a_recipe_is_trained_as_planned(recipe: str, packed_data: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(recipe, run, "--data", str(packed_data.text))
    config = from_dict(json.loads((run / "config.json").read_text()))
    steps = events_of(run, "step")
    trained = [s for s in range(STEPS) if s not in (5, 6)]
    assert [s["step"] - 1 for s in steps] == trained and [e["step"] for e in events_of(run, "skip")] == [6, 7]
    assert [s["phase"] for s in steps] == [name for name, span in spans(config) for s in span if s in trained]
    assert len({s["phase"] for s in steps}) == len(config.data.phases)
    assert [s["lr"] for s in steps] == [Schedule(config).learning_rate(s) for s in trained], (
        "one schedule over all phases")

    # the announced ledger, step by step, is what the settings say
    sizes = [4, 4, 6, 6] + [8] * (STEPS - 4)
    lengths = {name: SEQ_LEN for name, _ in spans(config)} | {spans(config)[1][0]: LONG_SEQ_LEN}
    entries = events_of(run, "phase")
    planned: dict[str, float] = {}
    for name, span in spans(config):
        for step in span:
            entry = [e for e in entries if e["step"] <= step][-1]
            assert (entry["name"], entry["seq_len"], entry["global_batch_size"], entry["skip"]) \
                == (name, lengths[name], sizes[step], step in (5, 6))
            for source, weight in entry["blend"].items():
                planned[source] = planned.get(source, 0) + weight * sizes[step] * lengths[name]
    last = events_of(run, "data_consumed")[-1]
    assert {name: tokens for name, tokens in last["plan"].items() if tokens} == {
        n: round(t) for n, t in planned.items()}
    assert set(planned) == {"even", "odd", "odd@60"}

    # tokens and padding of the steps make up the rows, and the sources' tokens make up the steps
    # and what was skipped
    rows = [sizes[s] * lengths[e["phase"]] for s, e in zip(trained, steps, strict=True)]
    taken = [b["tokens"] - a for a, b in zip([0, *(s["tokens"] for s in steps)], steps, strict=False)]
    assert taken == [round(row * (1 - e["padding_share"])) for row, e in zip(rows, steps, strict=True)]
    skipped = sum(last["tokens"].values()) - sum(taken)
    assert 0 < skipped <= sum(sizes[s] * lengths[name] for name, span in spans(config)
                              for s in span if s in (5, 6))
    for name, tokens in last["tokens"].items():
        assert 0.6 * planned[name] < tokens < planned[name] + LONG_SEQ_LEN, (
            "padding, and part of a sample at a change of weights")


@pytest.mark.deep
@pytest.mark.usefixtures("one_rank")
def test_a_source_added_in_mid_run_counts_from_there(packed_data: Any, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    pretrain("tiny-solar-open", run, "--data", str(packed_data.text))
    shutil.copytree(run / "checkpoints" / "step-8", other / "checkpoints" / "step-8")
    shutil.copy(run / "config.json", other)
    pretrain("tiny-solar-open", other, "--data", f"{packed_data.text}:3", "--data",
             f"{packed_data.chats}:1", "--resume")
    before, after = events_of(run, "phase"), events_of(other, "phase")
    assert [e for e in without_time(after) if e["step"] < 8] == [
        e for e in without_time(before) if e["step"] < 8]
    later = [e for e in after if e["step"] >= 8 and "odd@60" not in e["blend"]]
    assert later and all(e["blend"]["chat"] == pytest.approx(0.25) for e in later)
    chats = sum(len(range(max(8, e["step"]), following)) * e["global_batch_size"] * e["blend"].get("chat", 0)
                for e, following in zip(after, [*(e["step"] for e in after[1:]), STEPS], strict=True))
    consumed = events_of(other, "data_consumed")[-1]
    assert consumed["plan"]["chat"] == round(chats * SEQ_LEN)
    (source,) = open_sources({str(packed_data.chats): 1.0}, 368)
    assert min(source.shard("train").lengths) > SEQ_LEN, "each conversation fills a sample"
    assert consumed["tokens"]["chat"] == pytest.approx(consumed["plan"]["chat"], abs=SEQ_LEN)


def without_time(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k != "time_s"} for e in events]
