"""Proposed command lines: one message names all faults, and the proposed line passes the command's checks."""

import json
from pathlib import Path

import pytest

from megatron_sov.base.errors import Fix, UserError
from megatron_sov.base.hints.lines import apply_fix, propose_line
from tests.base.hints.test_words import answer, write_files

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def list_proposed_commands(said: str) -> list[str]:
    """Return the commands that a message proposes."""
    proposed = said.partition("; write\n")[2].partition("\nthis line still has a fault")[0]
    return [line.strip() for line in proposed.splitlines()]


@pytest.mark.parametrize(("typed", "fix", "mended"), [
    ("sft --set a.b=1 --set c.d=2", Fix(options=("--set", "a.b=3")), "sft --set c.d=2 --set a.b=3"),
    ("sft --days 2w --data d", Fix(options=("--days", "14")), "sft --data d --days 14"),
    ("sft --days=2w", Fix(options=("--days", "14")), "sft --days 14"),
    ("sft x --data d", Fix(command="prefer", left_out=("x",)), "prefer --data d"),
    ("convert to-hf a b", Fix(command="convert from-hf"), "convert from-hf a b"),
    ("submit sft --data d", Fix(command="prefer"), "submit prefer --data d"),
    ("pretrain --data d", Fix(prefix="submit", arguments=("R",)), "submit pretrain R --data d"),
    ("sft --data n=a.csv:0.5 --from=a.csv", Fix(words={"a.csv": "b"}), "sft --data n=b:0.5 --from=b"),
    ("sft", Fix("megatron-sov prefer --data d"), "prefer --data d")])
def test_a_fix_changes_its_part_of_the_line_alone(typed: str, fix: Fix, mended: str) -> None:
    assert apply_fix("megatron-sov", typed.split(), fix) == mended.split()


def test_faults_of_consecutive_checks_share_one_message() -> None:
    """Three checks, each of which runs only if the previous one passes."""
    def check(line: list[str]) -> None:
        for name in ("one", "two", "three"):
            if f"{name}=1" not in line:
                raise UserError(f"{name}: is missing", Fix(options=("--set", f"{name}=1")))

    with pytest.raises(UserError) as first:
        check(["sft"])
    error = propose_line("megatron-sov", ["sft"], first.value, check)
    assert str(error) == ("one: is missing; two: is missing; three: is missing; write\n"
                          "  megatron-sov sft --set one=1 --set two=1 --set three=1")


def test_an_empty_document_is_no_fault(capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.jsonl").write_text('{"text": ""}\n{"text": "a"}\n')
    said = answer("sov-data tokenize --input t.jsonl --tokenizer-model tok --output o", capsys)
    assert "this line still has a fault: tok: does not exist" in said


@pytest.mark.parametrize(("typed", "write"), [
    # words without an option, by kind
    ("megatron-sov sft hf t.jsonl new", ["megatron-sov sft --from hf --data t.jsonl --run new"]),
    ("megatron-sov pretrain tiny-qwen3 tokens new",
     ["megatron-sov pretrain tiny-qwen3 --data tokens --run new"]),
    ("megatron-sov rl run hf t.jsonl --reward math --run r --store s",
     ["jq -c '.messages as $m | {prompt: $m[:-1], answer: $m[-1].content}' t.jsonl > t-prompts.jsonl",
      "megatron-sov rl run --from hf --reward math --run r --store s --prompts t-prompts.jsonl"]),
    ("sov-tokenizer train t.txt --vocab_size 900 --preset k-exaone --output o",
     ["sov-tokenizer train --preset k-exaone --output o --input t.txt --vocab-size 320"]),
    # commands of other programs, with the typed options
    ("megatron-sov finetune --model hf --train_file t.jsonl --output_dir o --num_train_epochs 2",
     ["megatron-sov sft --from hf --data t.jsonl --run o --set train.epochs=2"]),
    ("megatron-sov lora --from hf --data t.jsonl --run o --lora_r 8",
     ["megatron-sov sft --set lora.rank=8 --from hf --data t.jsonl --run o"]),
    ("megatron-sov export run --output o", ["megatron-sov convert to-hf run o"]),
    ("sov-data tokenize --input t.jsonl --tokenizer-model tok --output o",
     ["sov-data pack --input t.jsonl --tokenizer tok --output o --format chat"]),
    ("megatron-sov tokenize --input t.jsonl --tokenizer-model tok --output o",
     ["sov-data pack --input t.jsonl --tokenizer tok --output o --format chat"]),
    ("megatron-sov eval compare hf/config.json run/config.json --anything",
     ["megatron-sov eval difference hf/config.json run/config.json"]),
    ("sov-data blend tokens:1 tokens:2", ["sov-data mix tokens:1 tokens:2 --output new-output"]),
    # options in place of arguments, settings in place of options
    ("megatron-sov resume --run run", ["megatron-sov resume run"]),
    ("megatron-sov continue run", ["megatron-sov resume run"]),
    ("megatron-sov sft --from hf --data t.jsonl --run o lora.rank=8",
     ["megatron-sov sft --from hf --data t.jsonl --run o --set lora.rank=8"]),
    ("megatron-sov pretrain tiny-llama --data d --run r --resume done/checkpoints/step-9",
     ["megatron-sov pretrain tiny-llama --data d --run r --from done/checkpoints/step-9"]),
    # values
    ("megatron-sov recipes qwen3-8b --set optim.lr=0,1 --set optim.schedule=Cosine",
     ["megatron-sov recipes qwen3-8b --set optim.lr=0.1 --set optim.schedule=cosine"]),
    # kinds of files and folders
    ("megatron-sov convert to-hf hf o", ["megatron-sov convert from-hf hf o"]),
    ("megatron-sov chat hff", ["megatron-sov chat hf"]),
    ("megatron-sov chat Org/Name-1B --temperature 1",
     ["hf download Org/Name-1B --local-dir Name-1B", "megatron-sov chat Name-1B --temperature 1"]),
    ("sov-data pack --tokenizer hf --input t.jsonl --output o",
     ["sov-tokenizer import hf --output hf-tokenizer",
      "sov-data pack --tokenizer hf-tokenizer --input t.jsonl --output o --format chat"])])
def test_the_proposed_line_has_all_that_was_typed(typed: str, write: list[str],
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    write_files({"hf/model.safetensors": "", "hf/config.json": "{}", "hf/tokenizer.json": "{}",
                 "t.jsonl": CHAT, "t.txt": "a", "run/events.jsonl": "", "run/config.json": "{}",
                 "tokens/manifest.json": json.dumps({"kind": "tokens"}), "done/complete.json": "{}",
                 "d/manifest.json": "{}"})
    assert list_proposed_commands(answer(typed, capsys)) == write
