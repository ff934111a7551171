"""The messages of a run before its first and after its last step."""

import dataclasses
import json
import math
import shlex
from pathlib import Path

import pytest

from megatron_sov import recipes
from megatron_sov.base.figures import format_count, format_share
from megatron_sov.model.config import apply_settings
from megatron_sov.model.families.adapters import find_adapted_modules
from megatron_sov.model.families.count import count_params
from megatron_sov.model.process_memory import MemoryEstimate
from megatron_sov.plan.footprint.gpu_capacity import estimate_memory
from megatron_sov.runs.obs.meters import Meter
from megatron_sov.train.checkpointer import TrainState
from megatron_sov.train.data.ledger import LedgerEntry
from megatron_sov.train.data.sources import Source
from megatron_sov.train.stages.announcement import count_planned_tokens, format_banner, format_summary

CONFIG = apply_settings(recipes.get("tiny-solar-open"), ["train.steps=4"])
# First step, phase, tokens per sample, samples per step, shares of the sources.
ENTRIES = (LedgerEntry(0, "one", 100, 2, {"web": 1.0}),
           LedgerEntry(4, "two", 200, 2, {"web": 0.25, "code": 0.75}))


def test_announcement_describes_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = apply_settings(recipes.get("tiny-solar-open"), ["parallel.ep=2", "train.recompute=true"])
    sources = [Source(name, None, "text", {}, {"train": tokens}, 0.5)
               for name, tokens in (("web", 500), ("code", 600))]
    gib = 2**30
    memory = MemoryEstimate(states=6 * gib, peak=15 * gib // 2, on_host=130 * gib, fullest=8 * gib)
    lines = format_banner(config, 2, Path("runs/a"), range(2, 6), ENTRIES, sources, memory).splitlines()
    assert lines[0] == "tiny-solar-open: 2.5 M parameters (1.32 M active), steps 3 to 6, 1.2 K tokens"
    assert lines[1] == ("  processes  2: ep 2, dp 2; fp32, 6 GiB of weights, gradients and optimizer each, "
                        "7.5 GiB with activations, 130 GiB of the host's memory")
    assert lines[2] == "  data       web 600 tokens (1.2 epochs), code 600 tokens (1 epochs)"
    assert lines[3].startswith("  run        runs/a, a checkpoint every ")
    monkeypatch.setattr("megatron_sov.train.stages.announcement.count_over_long", lambda *_: [])
    chats = [dataclasses.replace(source, format="chat") for source in sources[:1]]
    lines = format_banner(config, 2, Path("runs/a"), range(2, 6), ENTRIES[:1], chats,
                          estimate_memory(config, 2)).splitlines()
    assert lines[2] == "  data       web 800 tokens with padding"


@pytest.mark.each(("steps", "web", "code"), [
    (range(6), 1000, 600), (range(4), 800, 0), (range(5, 6), 100, 300)])
def test_tokens_are_those_of_the_ledger(steps: range, web: float, code: float) -> None:
    result = count_planned_tokens(ENTRIES, steps)
    assert (result["web"], result["code"]) == (web, code)


def test_summary_describes_the_end_of_the_run(tmp_path: Path) -> None:
    run = tmp_path / "a"
    sources = [build_source("web", "chat"), build_source("code", "text"),
               build_source("pairs", "preference", 2)]
    run.mkdir()
    step_events = [{"event": "step", "step": step, "loss": 9.0, "meters": {"pairs_right": right}}
                   for step, right in ((1, 0.25), (6, 0.75))]
    pair_events = [{"event": "heldout_pairs", "step": step, "source": "pairs", "pairs_right": right}
                   for step, right in ((0, 0.5), (6, 0.9))]
    eval_events = [{"event": "eval", "step": step, "heldout": {
        "web": {"loss": web, "tokens": 10}, "code": {"loss": 1.25, "tokens": step + 1},
        "pairs": {"loss": 7.0, "tokens": 10}}} for step, web in ((0, 3.0), (3, 2.5), (6, 2.0))]
    (run / "events.jsonl").write_text("".join(
        json.dumps(event) + "\n" for event in [*step_events, *pair_events, *eval_events]))
    headline = [Meter("pairs_right", "pairs right", "share", "higher", heldout="heldout_pairs.pairs_right")]
    lines = format_summary(run, run / "checkpoints/step-6", TrainState(6, 1_500_000), 125.4, CONFIG, headline,
                           sources).splitlines()
    # Preference pairs have no comparable loss. `code` omits its first loss, as its token count changes.
    assert lines[0] == ("complete: step 6, 1.5 M tokens in 2:05 min; held-out pairs right 50 % -> 90 %, "
                        "held-out loss web 3.0000 -> 2.0000, code 1.2500; pairs right 50 % (mean of the last "
                        "2 steps)")
    assert lines[1] == f"  checkpoint  {run}/checkpoints/step-6" and f"megatron-sov report {run}" in lines[2]
    assert [line.split("megatron-sov ")[1] for line in lines[2:]] == [
        f"report {run}", f"chat {run}", f"convert to-hf {run} HF_DIR"]  # in the form that it was trained in
    adapter = apply_settings(CONFIG, ["lora.rank=4"])
    lines = format_summary(run, run / "c", TrainState(6, 1), 1.0, adapter, headline,
                           sources[1:2]).splitlines()
    assert lines[-1].endswith(f"megatron-sov convert to-peft {run} PEFT_DIR")
    assert lines[3].endswith(f"megatron-sov generate {run} --prompt TEXT")


def test_the_commands_that_go_on_can_be_pasted(tmp_path: Path) -> None:
    run = tmp_path / "a $(id) b"
    run.mkdir()
    (run / "events.jsonl").write_text("")
    lines = format_summary(run, run / "checkpoints/step-6", TrainState(6, 1), 1.0, apply_settings(
        CONFIG, ["lora.rank=4"]), [], [build_source("web", "chat")]).splitlines()
    assert [str(run) in shlex.split(line) for line in lines[2:]] == [True] * 4


def build_source(name: str, format: str, group: int = 1) -> Source:
    """Return a source of 100 training tokens; `group`: 2 for preference pairs."""
    return Source(name, None, format, {}, {"train": 100}, 1.0, group=group)


def test_an_adapter_says_how_much_learns() -> None:
    config = apply_settings(CONFIG, ["lora.rank=4"])
    num_trained = sum(math.prod(shape) for module in find_adapted_modules(config.model, config.lora)
                      for shape in module.shapes(config.lora).values())
    total = count_params(config.model).total + num_trained
    lines = format_banner(config, 1, Path("r"), range(4), ENTRIES, [],
                          estimate_memory(config, 1)).splitlines()
    learning = f"{format_count(num_trained)} of {format_count(total)} parameters learn"
    share = format_share(num_trained / total)
    assert lines[2] == (f"  adapter    of rank 4: {learning} "
                        f"({share}); `megatron-sov convert to-peft` writes it for PEFT")
