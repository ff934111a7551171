"""Distillation losses are equal to the papers' formulas, computed by hand in float64."""

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
from tests.engine.model.test_divergence import compute_divergence, select_events
from tests.layouts.layout_run import build_small_config

WHOLE = ["distillation.beta=0.3", "distillation.temperature=1.5", "distillation.ce_coeff=0.1"]
KINDS = {
    "whole": WHOLE,
    "two": WHOLE,
    "top-k": ["distillation.top_k=12", "distillation.temperature=2.0"],
    "top-k alone": ["distillation.top_k=12", "distillation.temperature=2.0", "distillation.beta=1",
                    "distillation.keep_remainder=false"],
}
FOLDERS = {"whole": ("whole",), "two": ("first", "second")}
"""Kind -> folders of stored teacher outputs; other kinds read `top`, one teacher's most probable tokens."""
SETTINGS = ["train.precision=fp64", 'data.phases=[{"name": "main", "seq_len": 64}]',
            "train.global_batch_size=4", "optim.lr=0.01", "data.heldout_tokens=200"]


def build_trainer(kind: str, data: list[str], states: str) -> tuple[Trainer, list[Any]]:
    """Return a trainer with one of `KINDS` as objective, and its data sources."""
    config = build_small_config("tiny-k-exaone", [*SETTINGS, *KINDS[kind]], data, "distill")
    parallel_world = world.join_world(config.parallel)
    config.check(parallel_world.size)
    sources = open_sources(config.data.paths, config.model.vocab_size)
    files = [StateFiles(Path(states) / name, sources) for name in FOLDERS.get(kind, ("top",))]
    teacher = StoredTeacher(files, config.distillation, sources, config.model.vocab_size)
    objective = TeacherFactory(Distillation, [teacher])
    return Trainer(config, parallel_world, RunFolder(Path("not-written")), sources, objective), sources


@pytest.fixture(scope="module")
def stored_teachers(write_teacher_states: Any, packed_data: Any, tmp_path_factory: pytest.TempPathFactory
                    ) -> dict[str, Any]:
    """Data folders (conversations and texts, longer ones truncated) and the folder of stored teacher
    outputs: arguments of `compare_losses`."""
    data, states = [packed_data.chats, packed_data.text], tmp_path_factory.mktemp("teachers")
    write_teacher_states(states / "whole", data, StateFormat("float32"))
    write_teacher_states(states / "first", data[:1], StateFormat("float32"))
    write_teacher_states(states / "second", data[1:], StateFormat("float32"), teacher="two")
    write_teacher_states(states / "top", data, StateFormat(top_k=12, temperature=2.0))
    return {"data": [str(folder) for folder in data], "states": str(states)}


def compute_by_hand(logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor,
                    settings: Any) -> dict[str, torch.Tensor]:
    """Compute the papers' losses and meters of each token.

    Args:
        logits, teacher_logits: shape [tokens, vocabulary].
        labels: shape [tokens].
        settings: DistillationConfig.

    Returns:
        Name -> values, shape [tokens].
    """
    log_p = (logits / settings.temperature).log_softmax(-1)
    log_q = (teacher_logits / settings.temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    kind = "top-k with the rest" if settings.keep_remainder else "top-k alone"
    events = select_events(kind if settings.top_k else "states", log_p, log_q, settings.top_k)
    forward_kl, divergence = (compute_divergence(*events, beta) for beta in (0, settings.beta))
    cross_entropy = -logits.log_softmax(-1)[torch.arange(len(labels)), labels]
    return {"divergence": divergence, "kl": forward_kl, "entropy": entropy, "cross_entropy": cross_entropy,
            "tokens": torch.ones(len(labels))}


def sum_by_hand(trainer: Any, batch: Any, teacher_files: dict[int, StateFiles]) -> dict[str, float]:
    """Sum `compute_by_hand` over a batch's learned tokens; each segment passes through the model alone.

    Args:
        trainer: its policy computes the logits.
        batch: the prepared batch.
        teacher_files: data source -> files with the teacher's exact hidden states.

    Returns:
        Name -> sum, and "starts": the largest offset of a segment in its document.
    """
    sums = {"starts": 0.0}
    for m in batch.micro_batches:
        for first, source, (document, start, count) in m.origins:
            segment = slice(first, first + count)
            alone = DocumentBatch([m.inputs.tokens[segment].tolist()], torch.device("cpu"))
            files = teacher_files[source]
            states = files.read_states(source, "train", document, start, count).double()
            values = compute_by_hand(trainer.policy.logits(alone, torch.arange(count)),
                                     states @ load_file(files.head)[HEAD_WEIGHT].double().T,
                                     m.labels[segment], trainer.config.distillation)
            learned = (m.weights[segment] > 0).double()
            for name, token_values in values.items():
                sums[name] = sums.get(name, 0.0) + float((token_values.double() * learned).sum())
            sums["starts"] = max(sums["starts"], start)
    return sums


def compare_losses(data: list[str], states: str) -> list[dict[str, Any]]:
    """Return terms and meters of the second batch, ours and those by hand, for each kind."""
    results = []
    for kind in KINDS:
        trainer, sources = build_trainer(kind, data, states)
        # By hand, whole distributions are always available, also where ours reads the top k.
        exact_files = [StateFiles(Path(states) / name, sources)
                       for name in FOLDERS["two" if kind == "two" else "whole"]]
        train_step(trainer)
        objective = trainer.objective
        batch = objective.prepare(objective.collect(trainer.policy, 1))
        expected = sum_by_hand(trainer, batch, {index: files for files in exact_files
                                                for index in files.sources})
        sums = trainer.forward_backward.compute_gradients(batch, objective, 2)
        tokens = expected["tokens"]
        results.append({
            "kind": kind, "tokens": tokens, "denominator": batch.targets["divergence"],
            "starts": expected["starts"], "mtp": sums.terms["mtp"],
            "ours": [sums.terms["divergence"] / tokens, sums.meters["kl"], sums.meters["entropy"]],
            "by hand": [expected[name] / tokens for name in ("divergence", "kl", "entropy")],
            "ce": [sums.terms.get("cross_entropy"), expected["cross_entropy"]]})
        trainer.close()
        world.leave_world()
    return results


@pytest.mark.distributed
def test_losses_are_the_papers(ranks: Any, job: Any, stored_teachers: dict[str, Any]) -> None:
    ((results,),) = ranks(job(__file__, "compare_losses", 1, stored_teachers))
    for result in results:
        assert result["tokens"] == result["denominator"] > 100
        assert result["starts"] > 0, "a segment inside its document was compared"
        assert result["mtp"] > 0
        # The most probable tokens' log-probabilities are stored in float32.
        tolerance = 1e-12 if result["kind"] in ("whole", "two") else 1e-6
        assert result["ours"] == pytest.approx(result["by hand"], rel=tolerance, abs=tolerance), result
    assert results[0]["ce"][0] == pytest.approx(results[0]["ce"][1], rel=1e-12)
    assert results[1]["kind"] == "two" and results[2]["ce"][0] is None
    assert results[1]["ours"] != pytest.approx(results[0]["ours"], rel=0.01)


def test_resume_rejects_another_teacher() -> None:
    run: Any = SimpleNamespace(_teacher=SimpleNamespace(teacher="blake3:one"))
    Distillation.restore(run, Distillation.state(run))
    with pytest.raises(UserError, match="--teacher: is blake3:one,"):
        Distillation.restore(run, {"teacher": "blake3:two"})
