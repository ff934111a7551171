"""Distillation losses against formulas in float64, document by document, and equal at every layout."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sov.base.errors import UserError
from megatron_sov.engine.decode.forward_only import DocumentBatch
from megatron_sov.engine.parallel import world
from megatron_sov.post.distillation.distill import Distillation, StoredTeacher, TeacherFactory
from megatron_sov.post.distillation.state_files import HEAD_WEIGHT, StateFiles, StateFormat
from megatron_sov.runs.folder import RunFolder
from megatron_sov.train.data.sources import open_sources
from megatron_sov.train.loop import train_step
from megatron_sov.train.trainer import Trainer
from tests.layouts.layout_run import small_config

WHOLE = ["distillation.beta=0.3", "distillation.temperature=1.5", "distillation.ce_coeff=0.1"]
KINDS = {
    "whole": WHOLE,
    "two": WHOLE,
    "top-k": ["distillation.top_k=12", "distillation.temperature=2.0"],
    "top-k alone": ["distillation.top_k=12", "distillation.temperature=2.0", "distillation.beta=1",
                    "distillation.keep_remainder=false"],
}
FOLDERS = {"whole": ("whole",), "two": ("first", "second")}
"""Objective kind -> stored teacher outputs, if these are other than the
most probable tokens of one teacher in `top`."""
SETTINGS = ["train.precision=fp64", 'data.phases=[{"name": "main", "seq_len": 64}]',
            "train.global_batch_size=8", "optim.lr=0.01", "data.heldout_tokens=600"]
FEWER = ["train.global_batch_size=4", "data.heldout_tokens=200"]
"""For what is done at several layouts, or token by token."""


def _begin(kind: str, settings: list[str], data: list[str], states: str) -> tuple[Any, Any, list[Any]]:
    """Return a trainer, its teacher, and its data sources."""
    config = small_config("tiny-k-exaone", [*SETTINGS, *KINDS[kind], *settings], data, "distill")
    place = world.join_world(config.parallel)
    config.check(place.size)
    sources = open_sources(config.data.paths, config.model.vocab_size)
    files = [StateFiles(Path(states) / name, sources) for name in FOLDERS.get(kind, ("top",))]
    teacher = StoredTeacher(files, config.distillation, sources, config.model.vocab_size)
    objective = TeacherFactory(Distillation, [teacher])
    return Trainer(config, place, RunFolder(Path("not-written")), sources, objective), teacher, sources


@pytest.fixture(scope="module")
def kept(write_teacher_states: Any, packed_data: Any, tmp_path_factory: pytest.TempPathFactory
         ) -> dict[str, Any]:
    """Arguments of the jobs: conversations and texts, longer ones truncated, and the stored form of the
    teacher's outputs."""
    data, states = [packed_data.chats, packed_data.text], tmp_path_factory.mktemp("kept")
    write_teacher_states(states / "whole", data, StateFormat("float32"))
    write_teacher_states(states / "first", data[:1], StateFormat("float32"))
    write_teacher_states(states / "second", data[1:], StateFormat("float32"), teacher="two")
    write_teacher_states(states / "top", data, StateFormat(top_k=12, temperature=2.0))
    return {"data": [str(d) for d in data], "states": str(states)}


def written_out(data: list[str], states: str) -> list[dict[str, float]]:
    """Return, for each kind, terms and meters of the second batch, ours and the formula's, each segment
    passed through the model alone."""
    results = []
    for kind in KINDS:
        trainer, _, sources = _begin(kind, FEWER, data, states)
        asked = trainer.config.distillation
        exact = {index: files for name in (FOLDERS["two"] if kind == "two" else FOLDERS["whole"])
                 for files in [StateFiles(Path(states) / name, sources)] for index in files.sources}
        train_step(trainer)
        objective = trainer.objective
        batch = objective.prepare(objective.collect(trainer.policy, 1))
        expected = {"divergence": 0.0, "cross_entropy": 0.0, "kl": 0.0, "entropy": 0.0, "tokens": 0.0,
                    "starts": 0.0}
        for m in batch.micro_batches:
            for first, source, (document, start, count) in m.origins:
                here = slice(first, first + count)
                logits = trainer.policy.logits(DocumentBatch([m.inputs.tokens[here].tolist()],
                                                             torch.device("cpu")), torch.arange(count))
                head = load_file(exact[source].head)[HEAD_WEIGHT].double()
                seen = exact[source].read_states(source, "train", document, start, count).double() @ head.T
                log_p, log_q = ((x / asked.temperature).log_softmax(-1) for x in (logits, seen))
                entropy = -(log_p.exp() * log_p).sum(-1)
                if asked.top_k:
                    ids = log_q.topk(asked.top_k).indices
                    log_p, log_q = (x.gather(1, ids) for x in (log_p, log_q))
                    if asked.keep_remainder:
                        log_p, log_q = (torch.cat([x, torch.log1p(-x.exp().sum(1, keepdim=True))], 1)
                                        for x in (log_p, log_q))
                    else:
                        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
                p, q, b = log_p.exp(), log_q.exp(), asked.beta
                log_m = (b * q + (1 - b) * p).log()
                kl = (q * (log_q - log_p)).sum(-1)
                divergence = (kl if b == 0 else (p * (log_p - log_q)).sum(-1) if b == 1 else
                              b * (q * (log_q - log_m)).sum(-1) + (1 - b) * (p * (log_p - log_m)).sum(-1))
                picked = -logits.log_softmax(-1)[torch.arange(count), m.labels[here]]
                learned = (m.weights[here] > 0).double()
                expected["cross_entropy"] += float((picked.double() * learned).sum())
                for name, values in (("divergence", divergence), ("kl", kl), ("entropy", entropy),
                                     ("tokens", torch.ones(count))):
                    expected[name] += float((values.double() * learned).sum())
                expected["starts"] = max(expected["starts"], start)
        sums = trainer.forward_backward.compute_gradients(batch, objective, 2)
        tokens = expected["tokens"]
        results.append({
            "kind": kind, "tokens": tokens, "denominator": batch.targets["divergence"],
            "starts": expected["starts"], "mtp": sums.terms["mtp"],
            "ours": [sums.terms["divergence"] / tokens, sums.meters["kl"], sums.meters["entropy"]],
            "wanted": [expected[name] / tokens for name in ("divergence", "kl", "entropy")],
            "ce": [sums.terms.get("cross_entropy"), expected["cross_entropy"]]})
        trainer.close()
        world.leave_world()
    return results


@pytest.mark.distributed
def test_losses_are_the_papers(ranks: Any, job: Any, kept: dict[str, Any]) -> None:
    ((results,),) = ranks(job(__file__, "written_out", 1, kept))
    for found in results:
        assert found["tokens"] == found["denominator"] > 100 and found["starts"] > 0 and found["mtp"] > 0
        # the most probable tokens' log-probabilities are kept in float32
        exact = 1e-12 if found["kind"] in ("whole", "two") else 1e-6
        assert found["ours"] == pytest.approx(found["wanted"], rel=exact, abs=exact), found
    assert results[0]["ce"][0] == pytest.approx(results[0]["ce"][1], rel=1e-12)
    assert results[1]["kind"] == "two" and results[2]["ce"][0] is None
    assert results[1]["ours"] != pytest.approx(results[0]["ours"], rel=0.01)


def test_resume_rejects_another_teacher() -> None:
    run: Any = SimpleNamespace(_teacher=SimpleNamespace(teacher="blake3:one"))
    Distillation.restore(run, Distillation.state(run))
    with pytest.raises(UserError, match="--teacher: is blake3:one,"):
        Distillation.restore(run, {"teacher": "blake3:two"})
