"""Run folders for reports. Together the runs have every kind of event that training writes."""

import json
import math
import random
from pathlib import Path

import pytest

from megatron_sov import recipes
from megatron_sov.base.artifacts import create_artifact, manifest_sha256
from megatron_sov.runs.obs.events import EventLog

SOURCES = ("english", "korean", "code")
"""Names of the data sources."""
HOSTILE = ("</script><script>window.hacked = 1</script><img src=https://evil.example/x.png "
           "onerror=window.hacked=1> & <b>bold</b>")
NUM_STEPS, CRASH, CHECKPOINT = 400, 233, 200
FINAL_LOSSES = {"english": 2.3, "korean": 2.6, "code": 1.8}


def _write_step(log: EventLog, step: int, noise: random.Random) -> None:
    """Write the `step` event of one step, with decaying losses and some noise."""
    loss = 2.1 + 5.5 * math.exp(-step / 60) + noise.gauss(0, 0.04)
    shift = {"english": 0.1, "korean": 0.25, "code": -0.4}
    log.write("step", step=step, loss=loss,
              losses={"lm": loss, "mtp": loss + 0.4, "balance": 0.02 + abs(noise.gauss(0, 0.002))},
              losses_by_source={name: loss + shift[name] + noise.gauss(0, 0.05) for name in SOURCES},
              meters={"clipped share": 0.2 * math.exp(-step / 90)},
              grad_norm=0.4 + 3 * math.exp(-step / 25) + abs(noise.gauss(0, 0.1)),
              lr=4e-3 * min(1, step / 20) * (1 - step / 450), tokens=step * 4096,
              step_time_s=0.8 + abs(noise.gauss(0, 0.03)), tokens_per_s=4096 / 0.82 + noise.gauss(0, 90),
              phase="1" if step <= 250 else "2.A", padding_share=abs(noise.gauss(0.01, 0.004)),
              max_violation=0.15 + 2 * math.exp(-step / 40) + abs(noise.gauss(0, 0.05)))


def _write_phases(log: EventLog) -> None:
    """Write the curriculum's `phase` events, as each start of a run does: phase "1" with two batch sizes, and
    phase "2.A" with another blend of sources."""
    for step, name, size, blend in ((0, "1", 8, {"english": 3, "korean": 1, "code": 1}),
                                    (50, "1", 16, {"english": 3, "korean": 1, "code": 1}),
                                    (250, "2.A", 16, {"english": 1, "korean": 2, "code": 1})):
        log.write("phase", step=step, name=name, blend=blend, seq_len=256, global_batch_size=size, skip=False)


def _write_evaluation(log: EventLog, step: int) -> None:
    """Write an evaluation whose losses (nats per token) decay to `FINAL_LOSSES`; a token has 3.4 bytes."""
    losses = {name: final + 5 * math.exp(-step / 70) for name, final in FINAL_LOSSES.items()}
    log.write("eval", step=step,
              heldout={name: {"loss": loss, "bits_per_byte": loss / math.log(2) / 3.4, "tokens": 16384}
                       for name, loss in losses.items()})


def _write_guard_events(log: EventLog, noise: random.Random) -> None:
    """Write events of the guards: routing of four layers every 20 steps, a rejected step, and an alarm."""
    for step in range(20, NUM_STEPS + 1, 20):
        log.write("routing", step=step, layers=[1, 2, 3, 4],
                  max_violation=[abs(noise.gauss(1, 0.2)) for _ in range(4)],
                  entropy=[min(1.0, abs(noise.gauss(0.9, 0.03))) for _ in range(4)], dead=[0, 0, 1, 0],
                  bias_spread=[0.001 * step * layer for layer in range(4)])
    log.write("skip", step=150, reason="the loss is nan", loss=math.nan, grad_norm=math.nan, ranks=[1])
    log.write("alarm", step=240, kind="collapse", layer=3, text=f"layer 3: its entropy is low {HOSTILE}")


def _write_scores(log: EventLog) -> None:
    """Write scores of two checkpoints on two tasks; the name of the second task has hostile text."""
    for step in (CHECKPOINT, NUM_STEPS):
        for task, value in (("kmmlu", step / 1000), (f"quiz {HOSTILE}", 0.9 - step / 1000)):
            log.write("eval_lm", step=step, model_hash=f"m{step}", task=task, task_hash="t", metric="acc",
                      k=None, filter="none", mode="default", value=value, items=300, failed=0, at_limit=0,
                      interval=[value - 0.05, value + 0.05], sampling={"temperature": 0.0})


def write_run(path: Path, *, when: tuple[str, ...] = ()) -> Path:
    """Write a run of `NUM_STEPS` steps that crashed after step `CRASH` and resumed from step `CHECKPOINT`.

    Args:
        path: The new run folder. Its parent gets the token artifact `tokens`, which is the run's input.
        when: Moments of needle scores, "before" and "after" an extension; a run without them has task scores.
    """
    path.mkdir(parents=True)
    corpus = path.parent / "tokens"
    if not corpus.exists():
        with create_artifact(corpus, "tokens") as writer:
            writer.content["num_tokens"] = 1
    config = recipes.get("tiny-solar-open").to_dict()
    config["data"]["paths"] = {str(corpus): 1.0}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    log, noise = EventLog(path / "events.jsonl"), random.Random(7)
    start = {"recipe": "tiny-solar-open", "num_ranks": 2, "layout": {"tp": 1, "pp": 1, "ep": 2, "dp": 2},
             "num_params": 2_891_264, "num_active_params": 1_120_000, "num_steps": NUM_STEPS,
             "machine": {"cpu": "Example CPU", "cores": 2},
             "inputs": [{"kind": "tokens", "path": str(corpus), "manifest_sha256": manifest_sha256(corpus)}]}
    log.write("run_start", **start, resumed_from=0)
    _write_phases(log)
    for step in range(1, CRASH + 1):
        _write_step(log, step, noise)
    log.write("checkpoint", step=CHECKPOINT, path="checkpoints/step-200", save_s=1.4)
    log.write("resume", step=CHECKPOINT, reason="continued from step-200")
    log.write("run_start", **start, resumed_from=CHECKPOINT)
    _write_phases(log)
    log.write("warning", step=350, text="source korean: 4.1 epochs, more than data.max_epochs = 4; add data")
    for step in range(CHECKPOINT + 1, NUM_STEPS + 1):
        _write_step(log, step, noise)
    for step in range(0, NUM_STEPS + 1, 50):
        _write_evaluation(log, step)
    _write_guard_events(log, noise)
    if not when:
        _write_scores(log)
    for moment in when:
        accuracy = 0.3 if moment == "before" else 0.97  # of the shortest length; 0.04 less for each doubling
        cells = [{"kind": "multi-key", "language": language, "length_tokens": length, "depth": depth,
                  "distractors": length // 40,
                  "correct": round(20 * max(0.0, min(1.0, accuracy - 0.04 * i + noise.gauss(0, 0.03)))),
                  "samples": 20, "interval": [0.5, 1.0]}
                 for language in ("english", "korean") for i, length in enumerate((256, 512, 1024, 2048))
                 for depth in (0.0, 0.25, 0.5, 0.75, 0.95)]
        log.write("needle", step=NUM_STEPS, when=moment, by="generation", seed=0, distractor_share=0.25,
                  cells=cells, score=accuracy)
    log.write("sample", step=NUM_STEPS, prompt="한국의 수도는", text=" 서울이다. 서울은 한강을 끼고 있다.",
              target=None)
    log.write("sample", step=NUM_STEPS, prompt="The capital of France is", text=HOSTILE, target="Paris")
    if "after" not in when:
        log.write("conversion", target="hf", checks=[
            {"name": "largest difference of logits", "value": 3.1e-6, "limit": 1e-4, "passed": True},
            {"name": "tensors left over", "value": 0, "limit": 0, "passed": True}])
    log.write("checkpoint", step=NUM_STEPS, path="checkpoints/step-400", save_s=1.2, stall_s=0.2)
    with create_artifact(path / "checkpoints" / f"step-{NUM_STEPS}", "checkpoint") as writer:
        writer.add_input(corpus)
    log.write("run_end", step=NUM_STEPS, wall_s=330.0, final_loss=2.1)
    log.close()
    return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two runs of one model: "pretrain", and "extend" with needle scores before and after."""
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / "pretrain"), write_run(root / "extend", when=("before", "after"))]


@pytest.fixture(scope="session")
def hostile() -> str:
    """Text of a model with HTML that would run a script in the reader's browser if it were not escaped."""
    return HOSTILE


def write_other_model(path: Path, *, passed: bool = True) -> Path:
    """Write a run of 10 steps of a smaller model whose gate has passed or failed."""
    log = EventLog(path / "events.jsonl")
    (path / "config.json").write_text(json.dumps(recipes.get("tiny-k-exaone").to_dict()), encoding="utf-8")
    log.write("run_start", recipe="tiny-k-exaone", num_ranks=1, num_params=439_872, num_active_params=366_144,
              resumed_from=0)
    for step in range(1, 11):
        log.write("step", step=step, loss=1.0, tokens=step * 100)
    log.write("eval", step=10, heldout={"english": {"loss": 4.0, "bits_per_byte": 5.157, "tokens": 100}})
    log.write("gate", step=10, passed=passed, judged=passed, threshold=0.8, loss=2.0, start_loss=2.0,
              loss_limit=2.1, min_steps=5, failing_cells=[], failing_rows=[],
              rows=[{"kind": "multi-key", "language": "english", "accuracy": 0.85}])
    log.write("run_end", step=10, wall_s=9.0, final_loss=1.0)
    log.close()
    return path


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder "retrieval": a run of a smaller model than that of `runs`, with a passed gate."""
    (path := tmp_path_factory.mktemp("other") / "retrieval").mkdir()
    return write_other_model(path)
