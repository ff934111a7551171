"""Single judged responses: the loss written out over the whole batch, the same at every layout."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
from test_preference import LAYOUTS, _trainer

BETA, WEIGHTS, STEPS = 0.3, (1.2, 0.9), 3
KTO = ["preference.method=kto", f"preference.beta={BETA}", f"preference.desirable_weight={WEIGHTS[0]}",
       f"preference.undesirable_weight={WEIGHTS[1]}"]


def written_out(policy: Any, batch: Any) -> tuple[float, float]:
    """Return loss and z_0 of a batch on one process, each response passed through the model alone."""
    import torch

    from megatron_sov.mcore.decode.forward_only import Inputs
    from megatron_sov.post import reference

    ratios, good = [], []
    for m in batch.micro_batches:
        for first, end in zip(m.inputs.host_bounds, m.inputs.host_bounds[1:], strict=False):
            if m.inputs.padding[first]:
                continue
            ids = m.inputs.tokens[first:end].tolist()
            logits = policy.logits(Inputs([ids], torch.device("cpu")), torch.arange(len(ids))).double()
            learned = (m.types[first:end] == 2) & (m.weights[first:end] > 0)
            own = logits.log_softmax(-1)[torch.arange(len(ids)), m.labels[first:end]][learned].sum()
            ratios.append(float(own - m.columns[reference.COLUMN][first:end].double()[learned].sum()))
            good.append(bool(m.columns["desirable"][first:end][learned].mean() > 0.5))
    distance = max(sum(ratios[1::2]) / len(ratios[1::2]), 0.0)
    losses = [WEIGHTS[0] / (1 + math.exp(BETA * (ratio - distance))) if is_good
              else WEIGHTS[1] / (1 + math.exp(-BETA * (ratio - distance)))
              for ratio, is_good in zip(ratios[0::2], good[0::2], strict=True)]
    return sum(losses) / len(losses), distance


def curve(settings: list[str], data: str, run: str, by_hand: bool = False) -> list[dict[str, Any]]:
    """Train; return each step's losses, meters and gradient norm, and what they are by hand."""
    from megatron_sov.mcore.parallel import world

    trainer = _trainer([*KTO, *settings], data, Path(run))
    expected: list[tuple[float, float]] = []
    if by_hand:
        collect = trainer.objective.collect

        def seen(policy: Any, step: int) -> Any:
            batch = collect(policy, step)
            expected.append(written_out(policy, batch))
            return batch

        trainer.objective.collect = seen
    results = [trainer.update() for _ in range(STEPS)]
    trainer.close()
    world.leave()
    return [{"loss": r.loss, "grad_norm": r.grad_norm, **r.losses, **r.meters,
             **({"by hand": expected[i]} if by_hand else {})} for i, r in enumerate(results)]


@pytest.fixture(scope="module")
def judged(packed_data: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums, two in three of which are judged good, packed."""
    from data_prep.cli import main as sov_data

    folder = tmp_path_factory.mktemp("judged")
    (folder / "judged.jsonl").write_text("\n".join(json.dumps({
        "prompt": f"What is {i} plus {i % 7}?", "label": i % 3 > 0,
        "response": f"{i} plus {i % 7} is {i + i % 7}." if i % 3 else f"It is {i}, I am sure."})
        for i in range(60)))
    assert sov_data(["unpaired", "--input", str(folder / "judged.jsonl"), "--output",
                     str(folder / "unpaired")]) == 0
    assert sov_data(["pack", "--tokenizer", str(packed_data.tokenizer), "--heldout", "0.2", "--workers", "1",
                     "--format", "preference", "--column", "desirable", "--input",
                     str(folder / "unpaired/unpaired.jsonl"), "--output", str(folder / "packed")]) == 0
    return folder / "packed"


@pytest.mark.distributed
def test_the_loss_is_the_papers_over_the_whole_batch_at_every_layout(ranks: Any, job: Any, judged: Path,
                                                                     tmp_path: Path) -> None:
    def of(name: str, nproc: int, settings: list[str], by_hand: bool = False) -> Any:
        return job(__file__, "curve", nproc, {"settings": settings, "data": str(judged), "by_hand": by_hand,
                                              "run": str(tmp_path / name)})

    ((alone,),) = ranks(of("alone", 1, [], by_hand=True))
    for name in LAYOUTS:
        shutil.copytree(tmp_path / "alone/reference", tmp_path / name / "reference")
    found = ranks(*(of(name, *layout) for name, layout in LAYOUTS.items()))
    expected = [step.pop("by hand") for step in alone]
    # the reference keeps float32: some 40 numbers of 1e-7 each
    for step, (loss, distance) in zip(alone, expected, strict=True):
        assert (step["preference"], step["distance"]) == pytest.approx((loss, distance), rel=1e-5, abs=1e-5)
    assert max(distance for _, distance in expected) > 0.01, "the estimate is told from none"
    assert alone[-1]["desirable_reward"] > alone[-1]["undesirable_reward"]
    for name, per_rank in zip(LAYOUTS, found, strict=True):
        for ours, theirs in zip(per_rank[0], alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-13), name
