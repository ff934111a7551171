"""`megatron-sov rl run --set policy.method=gkd`: distillation on the student's own text and on data, compared
with transformers and with `distill`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sov.base.artifacts import read_manifest
from megatron_sov.convert import to_hf
from megatron_sov.model.config import PolicyConfig
from megatron_sov.train.data.sources import open_sources
from tests.run_files import list_losses, read_run_events, read_steps
from tests.typed_words import format_set_options

BETA, TEMPERATURE = 0.3, 1.5
DIVERGENCE = (f"distillation.beta={BETA}", f"distillation.temperature={TEMPERATURE}")
SETTINGS = ("rollout.rounds=4", "rollout.prompts_per_round=4", "rollout.samples_per_prompt=1",
            "rollout.piece_prompts=2", "rollout.max_new_tokens=6", "rollout.max_prompt_tokens=8",
            "policy.method=gkd", "policy.on_policy_share=0.5", "rollout.seed=30", "optim.lr=1e-2",
            "optim.warmup_steps=0", "train.eval_every_steps=0", "train.keep_checkpoints=0")
"""With this seed, rounds 1 and 3 are data, and rounds 2 and 4 the student's answers."""
Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gkd")
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{i}?"}}\n' for i in range(16)))
    return folder


@pytest.fixture(scope="module")
def student(folder: Path, packed_data: Any, tiny: list[str], run_checked: Any) -> Path:
    """Return a run of a smaller model than the teacher's."""
    run_checked("pretrain", "tiny-solar-open", "--data", str(packed_data.text), "--run",
                str(folder / "student"), *tiny, "--set", "train.steps=2")
    return folder / "student"


@pytest.fixture(scope="module")
def build_command(folder: Path, student: Path, teacher: Path, tiny: list[str], packed_data: Any) -> Command:
    """Return `command(run, *more)`."""
    def build_command(run: str, *more: str) -> list[str]:
        return ["rl", "run", "tiny-solar-open", *tiny,
                *format_set_options((*SETTINGS, *DIVERGENCE)), "--prompts",
                str(folder / "prompts.jsonl"), "--reward", "none", "--plain", "--from", str(student),
                "--teacher", str(teacher), "--data", str(packed_data.chats), "--run", str(folder / run),
                "--store", str(folder / f"{run}-store"), *more]

    return build_command


@pytest.fixture(scope="module")
def complete_run(folder: Path, build_command: Command, run_checked: Any) -> Path:
    run_checked(*build_command("whole"))
    return folder / "whole"


def compute_reference_divergence(run: Path, number: int, folder: Path, teacher: Path) -> tuple[float, float]:
    """Return mean generalized JSD and forward KL over the student's text of a round, with torch's KL of the
    two models' logits, as in TRL's GKD trainer."""
    import torch
    from torch.nn.functional import kl_div
    from transformers import AutoModelForCausalLM

    models = []
    for name, checkpoint in (("teacher", teacher / "checkpoints/step-2"),
                             ("student", run / f"checkpoints/step-{number - 1}")):
        to_hf(checkpoint, folder / f"hf-{name}", "float32")
        models.append(AutoModelForCausalLM.from_pretrained(folder / f"hf-{name}", dtype=torch.float32))
    [source] = open_sources({str(run / f"rounds/{number:04d}"): 1.0}, 368, ("rollouts",))
    shard, sums, count = source.open_split("train"), np.zeros(2), 0
    for document, length in enumerate(np.asarray(shard.lengths[np.arange(len(shard.lengths))]).tolist()):
        ids = torch.tensor(shard.tokens(document, 0, length).tolist())[None]
        is_student = torch.tensor(shard.loss_weights(document, 0, length)[1:] > 0)
        with torch.no_grad():
            teacher_logprobs, student_logprobs = (
                (model(ids).logits[0, :-1].double()[is_student] / TEMPERATURE).log_softmax(-1)
                for model in models)
        q, p = teacher_logprobs, student_logprobs
        m = torch.log(BETA * q.exp() + (1 - BETA) * p.exp())

        def compute_kl(source: torch.Tensor, target: torch.Tensor) -> float:
            return float(kl_div(target, source, reduction="sum", log_target=True))

        sums += BETA * compute_kl(q, m) + (1 - BETA) * compute_kl(p, m), compute_kl(q, p)
        count += int(is_student.sum())
    return tuple(sums / count)


def test_answers_are_learned_by_the_papers_divergence(complete_run: Path, folder: Path,
                                                      teacher: Path) -> None:
    step = read_steps(complete_run)[1]
    loss, kl = compute_reference_divergence(complete_run, 2, folder, teacher)
    assert step["loss"] == pytest.approx(loss, rel=2e-4) and loss > 1e-4
    assert step["meters"]["kl"] == pytest.approx(kl, rel=2e-4)
    assert [list(e["losses_by_source"]) for e in read_steps(complete_run)] == [["chat"], ["rollouts"]] * 2
    assert sorted(p.name for p in (complete_run / "rounds").glob("????")) == ["0002", "0004"]
    # one schedule over the whole run
    rates = [e["lr"] for e in read_steps(complete_run)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) > 2


@pytest.mark.distributed
def test_data_are_learned_as_distill_learns_them(complete_run: Path, folder: Path, student: Path,
                                                 teacher: Path, tiny: list[str], packed_data: Any,
                                                 run_checked: Any) -> None:
    distilled = folder / "distilled"
    run_checked("distill", "tiny-solar-open", *tiny, "--from", str(student), "--teacher", str(teacher),
                "--data", str(packed_data.chats), "--run", str(distilled), "--states-dtype",
                "float32", *format_set_options((*DIVERGENCE, "train.steps=1")))
    assert list_losses(complete_run)[0] == pytest.approx(list_losses(distilled)[0], rel=1e-5)
    ours, expected = (read_run_events(run, "heldout_divergence")[0] for run in (complete_run, distilled))
    assert ours["kl"] == pytest.approx(expected["kl"], rel=1e-5)
    assert read_manifest(folder / "distilled.states", "teacher_states").settings["teacher"]


def test_the_seed_alone_chooses_the_rounds_on_student_text() -> None:
    policy = PolicyConfig("gkd", on_policy_share=0.25)
    drawn_rounds = [[policy.is_on_policy(seed, number) for number in range(1, 4001)] for seed in (0, 0, 1)]
    assert drawn_rounds[0] == drawn_rounds[1] != drawn_rounds[2]
    # four standard deviations of a binomial
    assert all(abs(sum(choices) / 4000 - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5 for choices in drawn_rounds)
    assert all(PolicyConfig("gkd").is_on_policy(0, number) for number in range(1, 100))


@pytest.mark.each(("more", "message"), [
    (["--set", "rollout.max_staleness=1"], "max_staleness = 1 must be 0: with policy.on_policy_share = 0.5"),
    (["--set", "policy.method=opd"], 'on_policy_share = 0.5 has no effect with policy.method = "opd"'),
    (["--teacher", "math=elsewhere"], "learns from exactly one teacher checkpoint"),
])
def test_impossible_runs_are_refused_before_work_starts(more: list[str], message: str, folder: Path,
                                                        build_command: Command, get_refusal: Any) -> None:
    assert message in get_refusal(*build_command("refused", *more))
    assert not (folder / "refused").exists()
