"""`megatron-sov rl run --teacher ... --teacher-url ...`: teachers' log-probabilities of student tokens,
compared with transformers."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_sov import recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.commands.rl.teacher_models import check_teacher_model
from megatron_sov.model.config import ModelConfig
from megatron_sov.runs.obs.meters import format_step, read_headline
from megatron_sov.train.data.sources import open_sources
from tests.run_files import read_run_events
from tests.token_servers import VllmDouble
from tests.typed_words import format_set_options

SETTINGS = ("rollout.rounds=2", "rollout.prompts_per_round=4", "rollout.samples_per_prompt=1",
            "rollout.piece_prompts=2", "rollout.max_new_tokens=6", "rollout.max_prompt_tokens=8",
            "rollout.steps_per_round=2", "policy.method=opd", 'data.phases=[{"name": "main", "seq_len": 32}]',
            "optim.lr=1e-2", "optim.warmup_steps=0", "train.eval_every_steps=0", "model.hidden_size=48",
            "train.checkpoint_every_steps=2")
Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rl-teachers")
    (folder / "prompts.jsonl").write_text("".join(
        json.dumps({"prompt": f"{i}?", "domain": "ab"[i % 2]}) + "\n" for i in range(8)))
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[VllmDouble]:
    """A teacher that gives token t the log-probability -t / 100."""
    vllm_double = VllmDouble(vocab_size=368)
    yield vllm_double
    vllm_double.close()


@pytest.fixture(scope="module")
def build_command(folder: Path, teacher: Path, tiny: list[str], server: VllmDouble) -> Command:
    """Return `command(run, *more)`: the run starts from step 2 of `teacher`, and step 1 teaches domain a."""
    def build_command(run: str, *more: str) -> list[str]:
        return ["rl", "run", "tiny-solar-open", *tiny, *format_set_options(SETTINGS),
                "--prompts", str(folder / "prompts.jsonl"), "--reward", "none", "--plain", "--from",
                str(teacher), "--run", str(folder / run), "--store", str(folder / f"{run}-store"),
                "--teacher", f"a={teacher / 'checkpoints/step-1'}", "--teacher-url", server.url, *more]

    return build_command


@pytest.fixture(scope="module")
def complete_run(folder: Path, build_command: Command, run_checked: Any) -> Path:
    run_checked(*build_command("whole"))
    return folder / "whole"


def read_documents(run: Path, number: int) -> list[tuple[list[int], np.ndarray]]:
    """Return (tokens, mask of tokens that the student wrote) of each document of a round."""
    [source] = open_sources({str(run / f"rounds/{number:04d}"): 1.0}, 368, ("rollouts",))
    split = source.open_split("train")
    return [(split.tokens(d, 0, n).tolist(), split.loss_weights(d, 0, n) > 0)
            for d, n in enumerate(np.asarray(split.lengths[np.arange(len(split.lengths))]).tolist())]


def compute_hf_logprobs(checkpoint: Path, folder: Path, tokens: list[list[int]]) -> list[np.ndarray]:
    """Return transformers' log-probabilities of all tokens of each text but its first token."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_sov.convert import to_hf

    to_hf(checkpoint, folder, "float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logprobs_by_text = []
    with torch.no_grad():
        for ids in tokens:
            logprobs = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            logprobs_by_text.append(logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy())
    return logprobs_by_text


def test_token_advantage_is_teacher_minus_student_log_probability(complete_run: Path, teacher: Path,
                                                                  folder: Path) -> None:
    documents, domains = read_documents(complete_run, 1), []
    for name, count in read_manifest(complete_run / "rounds/0001").content["document_domains"]:
        domains += [name] * count
    assert len(domains) == len(documents) == 4 and set(domains) == {"a", "b"}
    texts = [ids for ids, _ in documents]
    student_logprobs = compute_hf_logprobs(teacher / "checkpoints/step-2", folder / "hf-2", texts)
    checkpoint_logprobs = compute_hf_logprobs(teacher / "checkpoints/step-1", folder / "hf-1", texts)
    teacher_logprobs = []
    for domain, ids, logprobs in zip(domains, texts, checkpoint_logprobs, strict=True):
        # the server teaches domain b: see `server`
        teacher_logprobs.append(logprobs if domain == "a" else -np.array(ids[1:]) / 100)
    expected = np.concatenate([[0.0, *logprobs] for logprobs in teacher_logprobs])
    stored = np.fromfile(complete_run / "rounds/0001.teacher_logprobs.f32", np.float32, len(expected))
    assert np.allclose(stored, expected, atol=2e-5)

    advantages = []
    for teacher_values, student_values, (_, is_student) in zip(teacher_logprobs, student_logprobs, documents,
                                                               strict=True):
        advantages.append((teacher_values - student_values)[is_student[1:]])
    round_event = read_run_events(complete_run, "round")[0]
    step = read_run_events(complete_run, "step")[0]
    # with --reward none, the run prints the KL divergence that it minimizes instead of a reward of 0
    assert "reward" not in round_event["means"] and "reward" not in step["meters"]
    headline, _ = read_headline(read_run_events(complete_run, "run_start")[0])
    assert format_step(step, headline, comparable=False).startswith("KL to the teacher ")
    assert round_event["reverse_kl"] == pytest.approx(-np.concatenate(advantages).mean(), abs=2e-5)
    for domain, reverse_kl in round_event["reverse_kl_domains"].items():
        of_domain = [values for values, name in zip(advantages, domains, strict=True) if name == domain]
        assert reverse_kl == pytest.approx(-np.concatenate(of_domain).mean(), abs=2e-5)
    # the first step has half of the prompts; its loss is the mean over their tokens, because all ratios are 1
    first_step = np.concatenate(advantages[:2])
    assert step["meters"]["reverse_kl"] == pytest.approx(-first_step.mean(), abs=2e-5)
    assert step["losses"]["policy"] == pytest.approx(-first_step.mean(), abs=2e-5)
    assert abs(round_event["reverse_kl_domains"]["a"]) > 1e-4, "teacher and student are different models"


@pytest.mark.each(("more", "message"), [
    (["--set", "policy.method=grpo", "--set", "rollout.samples_per_prompt=2"],
     "learns from no teacher; set policy.method=opd or gkd, or policy.opd_coeff in addition to a reward"),
    (["--teacher", "a=elsewhere"], "scores the same prompts; prefix each with its domain"),
    (["--set", "rollout.temperature=0.7"], "temperature = 0.7 must be 1: policy.opd_coeff = 1 compares"),
])
def test_impossible_runs_are_refused_before_work_starts(more: list[str], message: str, folder: Path,
                                                        build_command: Command, get_refusal: Any) -> None:
    assert message in get_refusal(*build_command("refused", *more))
    assert not (folder / "refused").exists()


def test_prompts_without_a_teacher_are_refused(build_command: Command, get_refusal: Any) -> None:
    words = build_command("refused")
    without_server = words[:-2]
    assert "line 2 has domain 'b', and the teachers have 'a'; add" in get_refusal(*without_server)
    assert "policy.opd_coeff = 1: needs a teacher; add --teacher" in get_refusal(*words[:-4])
    assert "--reward none: policy.method = dapo learns from rewards; choose a reward" in (
        get_refusal(*words[:-4], "--set", "policy.method=dapo", "--set", "rollout.samples_per_prompt=2"))


def test_a_mismatched_teacher_is_refused_by_its_first_wrong_field(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    config = recipes.get("tiny-solar-open")
    student = config.model

    def get_refusal(model: ModelConfig, tokenizer: Path, *, is_hf: bool = False) -> str:
        target: Any = SimpleNamespace(is_hf=is_hf, model=model, tokenizer_folder=tokenizer)
        with pytest.raises(UserError) as error:
            check_teacher_model("here", target, config, tmp_path)
        return str(error.value)

    assert get_refusal(replace(student, rope_theta=5.0, mtp_loss_coeff=9.0), tmp_path).startswith(
        f"--teacher here: has model.rope_theta = 5.0, the run {student.rope_theta}, and its weights temp")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "c": 1}}}')
    assert re.search(r"has a different tokenizer .*1: 'c' here, 'b' there.*choose a teacher with the model's",
                     get_refusal(replace(student, init_std=9.0), tmp_path / "other"))
    assert "convert from-hf`, or serve it (`" in get_refusal(student, tmp_path, is_hf=True)
