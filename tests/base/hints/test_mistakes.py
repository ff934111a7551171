"""Mistakes of newcomers: what the answer must name, so that the next line works."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.base.errors import suggest_name
from tests.base.hints.test_words import answer


@pytest.mark.parametrize(("typed", "parts"), [
    ("megatron-sov sft --from hf/model.safetensors --data d --run r", ["pass its folder, hf"]),
    ("megatron-sov plan llama-3.1-70b --cluster h100", ["; its family has 'llama-3.1-8b' ("]),
    ("megatron-sov extend x --from hf --data d --run r --to 128k", ["data.phases.0.seq_len=131072"]),
    ("megatron-sov sft --config theirs.yml --run r", ["train.global_batch_size=8"]),
    ("megatron-sov inspect cut.parquet", ["cut.parquet cannot be read: is not a Parquet file"]),
    ("megatron-sov sft --from run/model --data d --run r", ["pass the run, run"]),
    ("megatron-sov sft --from peft --data d --run r", ["from-hf hf hf-checkpoint", "--base hf-checkpoint"]),
    ("megatron-sov pretrain tiny-qwen3 --data chat.jsonl --run r", ["holds chats", "objective.name=lm"]),
    ("megatron-sov rl train x --from hf --prompts t.jsonl --reward math --store s --run r",
     ["--store s: does not exist", "rl run x --from hf --prompts t.jsonl --reward math --store s --run r"]),
    ("sov-data dedup --input t.jsonl --output o --threshold 0.8",
     ["- minhash_dedup: {threshold: 0.8}' > minhash_dedup.yaml", "run minhash_dedup.yaml --output o"]),
    ("sov-data run pipe.yaml --output o", ["it is language here", "languages: no such setting; it is keep"]),
    ("megatron-sov inspect d/shard.bin", ["is part of d; pass d"]),
    ("sov-data sample d -n 5", ["sov-data sample d --count 5"]),
    ("sov-data run script.py --output o", ["`sources:`", "datatrove"]),
    ("sov-data decontaminate --input t.jsonl --benchmarks mmlu,gsm8k --output o", ["by a benchmark's name"]),
    ("sov-tokenizer import vocab.json --output o", ["merges.txt", "save_pretrained"]),
    ("sov-tokenizer compare gpt2 gpt2 --text en=t.txt", ["hf download gpt2"]),
    ("megatron-sov pretrain x --data 0.7 d 0.3 d --run r", ["--data d:1 --run r"]),
    ("megatron-sov pretrain theirs.yml --data d --run r",
     ["pretrain --from M ", "train.global_batch_size=8"]),
    ("megatron-sov sft theirs.yml --run r", ["write\n  megatron-sov sft --from M"]),
    ("megatron-sov extend run --data d --run r", ["extend tiny-solar-open --from run --data d"]),
    ("megatron-sov plan hf --cluster h100 --nodes 8", ["plan --from hf --cluster"]),
    ("megatron-sov pretrain solar_open_100b --data d --run r", ["its family has 'solar-open-102b' and"]),
    ("megatron-sov pretrain x --data d --run r --gpus 0,1", ["--nproc 2"]),
    ("megatron-sov sft --from hf --data t.pdf --run r", ["is a document", "sov-data run"]),
    ("megatron-sov rl --from hf --reward math", ["rl run --from hf --reward math"]),
    ("megatron-sov eval hf --tasks t", ["write\n  megatron-sov eval lm hf --output scores.json --tasks t"]),
    ("megatron-sov eval hf --tasks t --num_fewshot 5",
     ["write\n  megatron-sov eval lm hf --output scores.json --tasks t --num-fewshot 5"]),
    ("megatron-sov generate hf Hello --max_tokens 20", ["generate hf --max-new-tokens 20 --prompt Hello"]),
    ("megatron-sov prefer --from hf --data d --run r --method DPO", ["write dpo"]),
    ("megatron-sov plan --model llama-3.1-8b --cluster h100", ["plan llama-3.1-8b --cluster h100"]),
    ("megatron-sov generate hf --prompt t.jsonl", ["is the name of a file", "--prompts t.jsonl"]),
    ("megatron-sov pretrain x --data d:0.7,d:0.3 --run r", ["--data d:0.7 --data d:0.3"]),
    ("sov-data sample d --split val -n 5", ["'train' or 'heldout'", "--count 5"]),
    ("sov-data mix 0.7 d 0.3 d --output o", ["sov-data mix d:1 --output o"]),
    ("sov-tokenizer train --input t.txt --vocab_size 32k --output o", ["32000", "--preset solar-open"]),
    ("megatron-sov sft --from m.gguf --data d --run r", [".gguf is not read", "*.safetensors"]),
    ("megatron-sov generate hf t.jsonl", ["generate hf --prompts t.jsonl"]),
    ("megatron-sov submit job.sbatch --cluster h100", ["write\n  sbatch job.sbatch"]),
    ("sov-data mix d d --output o --seed 42 --num-tokens 1e6",
     ["--seed, --num-tokens: ", "mix d d --output o\n"]),
    ("sov-data pack --input t.jsonl --vocab-file v --merge-file m --output o",
     ["--vocab-file, --merge-file: vocab.json", "--tokenizer DIR --output o"]),
    ("megatron-sov pretrain tiny-qwen3 --data t.jsonl --run r",
     ["--output t-tokenizer-2\n", "--tokenizer t-tokenizer-2 --input t.jsonl", "--data t-tokens-2 --run r"]),
    ("megatron-sov submit sft --gres=gpu:8 --mem 5G --nodes 2 --from hf --data d --run r",
     ["--cluster: is missing", "--account NAME", "--gres: GPUs", "--mem: is part"]),
    ("megatron-sov convert run merged to-hf", ["write\n  megatron-sov convert to-hf run merged"]),
    ("megatron-sov sft --from hf --data d --run r --config ds.json",
     ["--set train.precision=bf16 --set train.micro_batch_size=2 --set train.global_batch_size=8"]),
    ("megatron-sov pretrain tiny-qwen3 --data d/web/train.bin --run r", ["write\n  megatron-sov pretrain",
                                                                        "--data d --run r"]),
    ("megatron-sov rl run --from hf --prompts t.jsonl --reward math --store s --run r "
     "--vllm_gpu_memory_utilization 0.5", ["--engine-set memory_share=0.5"]),
    ("megatron-sov distill --from hf --teacher run --data d --run r --set distillation.lmbda=0.5",
     ["megatron-sov rl run --prompts FILE --reward none --from hf --teacher run --data d --run r --set "
      "policy.method=gkd --set policy.on_policy_share=0.5"]),
    ("megatron-sov prefer --from hf --data d --run r --method simpo --reference hf",
     ["simpo uses no reference; leave it out"]),
    ("megatron-sov distill states hf --data chat.jsonl --output o --top_k 4",
     ["--input chat.jsonl --format chat --output chat-tokens", "hf --data chat-tokens --output o --top-k 4"]),
    ("megatron-sov recipes --list qwen", ["write\n  megatron-sov recipes | grep -i qwen"]),
    ("megatron-sov recipes Qwen/Qwen3-0.6B", ["its family has", "write\n  megatron-sov recipes qwen3-"]),
    ("megatron-sov codec encode d --output o",
     ["sov-data encode-media --output o", "--image-tokenizer CODEC"]),
    ("megatron-sov pretrain tiny-qwen3 --data t.txt --tokenizer tok --run r",
     ["write\n  sov-data pack --tokenizer tok --input t.txt --format text --output t-tokens-2\n"
      "  megatron-sov pretrain tiny-qwen3 --data t-tokens-2 --run r"]),
    ("sov-data stats t.jsonl --tokenizer tok",
     ["--tokenizer tok --input t.jsonl", "sov-data stats t-tokens-2"]),
    ("megatron-sov sft --from https://huggingface.co/Org/Name-1B --data d --run r",
     ["hf download Org/Name-1B --local-dir Name-1B\n  megatron-sov sft --from Name-1B"]),
    ("megatron-sov distill --from hf --teacher http://h:80/v1 --data d --run r",
     ["--teacher http://h:80/v1: is a server's address", "--teacher HF_DIR"]),
    ("megatron-sov rl run --from hf --prompts t.jsonl --reward math --store s --run r --engine sglang",
     ["--run r --engine vllm"]),
    ("megatron-sov prefer --from hf --data d --run r --method rloo", ["`megatron-sov rl run --from"]),
    ("megatron-sov rl engines --from hf --tp 2", ["--engine vllm --engine-set tp=2"]),
    ("megatron-sov rl store gc s --older-than 7d", ["--rounds A-B --yes"]),
    ("megatron-sov tools play calculator --model hf --output o", ["tools run calculator hf --output o"]),
    ("megatron-sov watch run", ["write\n  megatron-sov status run --follow"]),
    ("megatron-sov ssp fuse d,run --method linear --output o",
     ["write\n  megatron-sov ssp fuse d run --output"]),
    ("megatron-sov submit pretrain --cluster h100 --time 2d --qos high tiny-qwen3 --data d --run r",
     ["tiny-qwen3 --data d --run r"]),
    ("megatron-sov resume missing", ["(runs there: run)"]),
    ("megatron-sov pretrain tiny-qwen3 --bf16 --data d --run r --no-such-option d2 x",
     ["--no-such-option: nothing takes this"]),
    ("megatron-sov sft --from lfs --data chat.jsonl --run r",
     ["is a Git LFS pointer", "git -C lfs lfs pull\n  megatron-sov sft --from lfs"]),
    ("megatron-sov prefer --from hf --data scored.jsonl --run r",
     ["sov-data pairs --input scored-groups.jsonl --output scored-pairs\n", "scored-pairs/pairs.jsonl"]),
    ("megatron-sov sft --from hf --data array.jsonl --run r",
     ["cp array.jsonl array.json\n  megatron-sov sft --from hf --data array.json"]),
    ("megatron-sov sft --from hf --data quoted.jsonl --run r", ["> quoted-parsed.jsonl\n", "quoted-parsed"]),
    ("megatron-sov eval lm hf --tasks mmlu --output o", ["cais/mmlu", "--output o --data-dir DIR"]),
    ("sov-tokenizer compare tok tok --text 'Guten Tag'", ["'Guten Tag' > text.txt\n", "--text text.txt"]),
    ("megatron-sov prefer --from hf --data kto1.jsonl --run r", ["sov-data unpaired --input kto1.jsonl"]),
    ("megatron-sov prefer --from hf --data kto.jsonl --run r",
     ["write\n  sov-data unpaired --input kto.jsonl --output kto-unpaired\n  megatron-sov prefer --from hf "
      "--data kto-unpaired/unpaired.jsonl --run r --method kto"]),
])
def test_the_answer_names_what_to_type(typed: str, parts: list[str], tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {"hf/model.safetensors": "", "hf/config.json": "{}", "d/manifest.json": "{}",
                       "d/shard.bin": "x", "m.gguf": "GGUF", "cut.parquet": "PAR1",
                       "peft/adapter_config.json": '{"base_model_name_or_path": "hf"}',
                       "pipe.yaml": "name: w\nsteps:\n- LanguageFilter: {languages: [en]}",
                       "chat.jsonl": '{"messages": [{"role": "user", "content": "a"}, '
                                     '{"role": "assistant", "content": "b"}]}',
                       "t.pdf": "%PDF", "d/web/train.bin": "x", "d/web/train.idx": "x",
                       "kto1.jsonl": '{"prompt": "a", "completion": "b", "label": 1}',
                       "lfs/model.safetensors": "version https://git-lfs", "lfs/config.json": "{}",
                       "scored.jsonl": '{"prompt": "a", "responses": ["b", "c"], "scores": [9, 2]}',
                       "array.jsonl": '[\n {"text": "a"}\n]', "quoted.jsonl": '{"messages": "[]"}',
                       "tok/manifest.json": '{"kind": "tokenizer"}',
                       "kto.jsonl": '{"prompt": "a", "completion": "b", "label": true}',
                       "ds.json": '{"bf16": {"enabled": true}, "train_micro_batch_size_per_gpu": 2, '
                                  '"gradient_accumulation_steps": 4}',
                       "run/events.jsonl": "", "run/config.json": '{"recipe": "tiny-solar-open"}',
                       "theirs.yml": "base_model: M\nmicro_batch_size: 2\ngradient_accumulation_steps: 4",
                       "t-tokenizer/a": "", "t-tokens/a": "",
                       "script.py": "from datatrove import x", "t.jsonl": '{"text": "a"}', "t.txt": "a",
                       "vocab.json": '{"a": 0}', "merges.txt": "a b"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    said = answer(typed, capsys)
    assert [part for part in parts if part not in said] == []


@pytest.mark.parametrize(("name", "known", "meant"), [
    ("fp16", ["fp64", "fp32"], ""), ("llama-3.1-70b", ["llama-3.1-8b"], ""),
    ("qwen3-8", ["qwen3-8b"], "; did you mean 'qwen3-8b'?"), ("h10", ["h100"], "; did you mean 'h100'?")])
def test_another_number_is_no_guess(name: str, known: list[str], meant: str) -> None:
    assert suggest_name(name, known) == meant
