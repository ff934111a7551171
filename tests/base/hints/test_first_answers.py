"""Typical wrong lines of users of other programs: one answer proposes the complete line."""

import contextlib
import json
import shlex
from pathlib import Path

import pytest

from megatron_sov import cli
from tests.base.hints.test_lines import CHAT, list_proposed_commands
from tests.base.hints.test_words import answer, write_files

SFT = "megatron-sov sft --from hf --data t.jsonl --run r"
DISTILL = "megatron-sov distill --from hf --teacher hf --data t.jsonl --run r"
FILES = {"hf/model.safetensors": "", "hf/config.json": "{}", "hf/tokenizer.json": "{}", "t.jsonl": CHAT,
         "run/events.jsonl": "", "run/config.json": "{}",
         "run/command.json": '{"argv": []}', "run/checkpoints/step-3/manifest.json": "{}",
         "tok/manifest.json": json.dumps({"kind": "tokenizer"}), "mega.idx": "x", "mega.bin": "x",
         "mega_ckpt/latest_checkpointed_iteration.txt": "9", "mega_ckpt/iter_9/mp_rank_00/model.pt": "x",
         "d/manifest.json": "{}", "e/manifest.json": "{}",
         "pairs.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "c"}',
         "zero3.json": '{"train_batch_size": 8, "zero_optimization": '
                       '{"stage": 3, "offload_optimizer": {"device": "cpu"}}}',
         "fsdp.yaml": "distributed_type: FSDP\nmixed_precision: bf16\nnum_processes: 2",
         "dataset_info.json": '{"chats": {"file_name": "t.jsonl", "columns": {"messages": "messages"}}}'}


@pytest.mark.parametrize(("typed", "write"), [
    # a path names a part of an artifact
    ("sov-data pack --tokenizer tok --input mega --output o",
     "sov-data adopt mega --tokenizer tok --output o"),
    ("megatron-sov resume run/checkpoints/checkpoint-5", "megatron-sov resume run"),
    ("megatron-sov convert from-megatron mega_ckpt/iter_9/mp_rank_00/model.pt o",
     "megatron-sov convert from-megatron mega_ckpt o"),
    # files of other programs
    (f"{SFT} --deepspeed zero3.json",
     f"{SFT} --set train.global_batch_size=8 --set parallel.zero1=true --set gpu.optimizer_offload=1 "
     "--set train.precision=bf16"),
    ("megatron-sov sft --config fsdp.yaml --from hf --data t.jsonl --run r",
     "megatron-sov sft --set parallel.zero1=true --set train.precision=bf16 --nproc 2 --from hf "
     "--data t.jsonl --run r"),
    ("megatron-sov sft --from hf --data dataset_info.json --run r", SFT),
    # values of other programs
    (f"{SFT} --set optim.betas=0.9,0.95", f"{SFT} --set optim.beta1=0.9 --set optim.beta2=0.95"),
    (f"{SFT} --adam_betas 0.9 0.95", f"{SFT} --set optim.beta1=0.9 --set optim.beta2=0.95"),
    ("megatron-sov pretrain tiny-qwen3 --data 0.7:d,0.3:e --run r",
     "megatron-sov pretrain tiny-qwen3 --data d:0.7 --data e:0.3 --run r"),
    (f"{DISTILL} --set distill.kl=reverse", f"{DISTILL} --set distillation.beta=1"),
    ("sov-data filter --input t.jsonl --lang en,ko --min-words 50 --output o",
     "printf '%s\\n' 'name: web' sources: '  - {name: web, path: t.jsonl, kind: en}' steps: "
     """'  - language: {keep: [en,ko]}' '  - rules: {thresholds: {min_words: 50}}' > """
     "rules.yaml\nsov-data run rules.yaml --output o"),
    # what another command or setting does
    ("megatron-sov report run --format tensorboard --logdir tb", "megatron-sov report run"),
    ("megatron-sov reward-model --from hf --data pairs.jsonl --run r",
     "megatron-sov prefer --from hf --data pairs.jsonl --run r"),
    ("megatron-sov plan qwen3-moe-30b --cluster h100 --nodes 1 --tp 4 --pp 2 --ep 8",
     "megatron-sov plan qwen3-moe-30b --cluster h100 --set parallel.tp=4 --set parallel.pp=2 "
     "--set parallel.ep=8 --set parallel.sp=true --nodes 2"),
    ("megatron-sov plan llama-3.1-8b --gpu NVIDIA-A100-SXM4-40GB",
     "printf \"%s\\n\" \"description: nodes of 8 A100-40GB\" \"gpu: a100-40\" > a100-40.yaml\n"
     "megatron-sov plan llama-3.1-8b --cluster a100-40.yaml"),
    ("megatron-sov chat http://localhost:9/v1", "megatron-sov serve MODEL --port 9"),
])
def test_one_answer_has_the_complete_line(typed: str, write: str,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    write_files(FILES)
    message = answer(typed, capsys)
    assert "\n".join(list_proposed_commands(message)) == write, message


def test_benchmarks_are_downloaded_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.jsonl").write_text(CHAT)
    download, line = list_proposed_commands(answer(
        "sov-data decontaminate --input t.jsonl --against gsm8k,mmlu --output o", capsys))
    code = shlex.split(download)[-2]
    assert "('openai/gsm8k', 'main')" in code and "in 'gsm8k,mmlu'.split(',')" in code
    assert line == "sov-data decontaminate --input t.jsonl --benchmarks benchmarks --output o"


@pytest.mark.each(("rank", "line"), [("0", f"write\n  {SFT} --nproc 2\n"), ("1", "")])
def test_a_line_of_torchrun_keeps_its_processes(rank: str, line: str, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    """The first rank prints the message; the other ranks print nothing."""
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    with contextlib.suppress(SystemExit):
        cli.main(["sft", "--model", "hf", "--dataset", "t.jsonl", "--run", "r"])
    printed = capsys.readouterr().err
    assert printed.endswith(line) and bool(printed) == bool(line)
