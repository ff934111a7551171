"""Command lines in the words of other programs, and the complete command that the message proposes."""

import argparse
import json
import os
import shlex
from pathlib import Path

import pytest

import data_prep.cli
import tokenizer.cli
from megatron_sov import cli
from megatron_sov.base.documents.files import list_files
from megatron_sov.base.documents.rows import fix_records
from megatron_sov.base.errors import Fix, UserError
from megatron_sov.base.hints import words
from megatron_sov.base.hints.foreign import multiply_context
from megatron_sov.base.settings import SettingsError
from megatron_sov.base.settings.problem import ProblemCode, SettingsProblem

PROGRAMS = {"megatron-sov": cli.main, "sov-data": data_prep.cli.main, "sov-tokenizer": tokenizer.cli.main}
SFT = "megatron-sov sft --from M --data D --run R"


def answer(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    program, *typed = shlex.split(line)
    assert PROGRAMS[program](typed) == 2
    return capsys.readouterr().err


def write_files(files: dict[str, str]) -> None:
    """Write files (name -> text) into the working folder."""
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


@pytest.mark.parametrize(("typed", "write"), [
    ("megatron-sov sft --model M --dataset D --output_dir R", SFT),
    (f"{SFT} --set optim.lr 2e-5", f"{SFT} --set optim.lr=2e-5"),
    (f"{SFT} --set optim.lr=2e-5,train.steps=5", f"{SFT} --set optim.lr=2e-5 --set train.steps=5"),
    (f"{SFT} --num_train_epochs 3", f"{SFT} --set train.epochs=3"),
    (f"{SFT} --gradient_accumulation_steps 4 --per_device_train_batch_size 2 --nproc 8",
     f"{SFT} --set train.global_batch_size=64 --set train.micro_batch_size=2 --nproc 8"),
    (f"{SFT} --global_batch_size 64 --gradient_accumulation_steps 8",
     f"{SFT} --set train.global_batch_size=64"),
    (f"{SFT} --set train.global_batch_size=64 --gradient_accumulation_steps 8",
     f"{SFT} --set train.global_batch_size=64"),
    (f"{SFT} --train_batch_size 64 --train_micro_batch_size_per_gpu 2 --gradient_accumulation_steps 4",
     f"{SFT} --set train.global_batch_size=64 --set train.micro_batch_size=2"),
    (f"{SFT} --warmup_ratio 0.03 --max_steps 1000",
     f"{SFT} --set optim.warmup_steps=30 --set train.steps=1000"),
    (f"{SFT} --load_in_4bit --bf16 true", f"{SFT} --set lora.rank=16 --set train.precision=bf16"),
    (f"{SFT} --target_modules q_proj v_proj", f"{SFT} --set 'lora.targets=[\"q_proj\", \"v_proj\"]' "
     "--set lora.rank=16"),
    ("megatron-sov plan qwen3-8b --cluster h100 --gpus 64",
     "megatron-sov plan qwen3-8b --cluster h100 --nodes 8"),
    ("megatron-sov eval lm --model hf --model_args pretrained=M,dtype=bfloat16 --tasks t --num_fewshot 5 "
     "--output_path o", "megatron-sov eval lm M --tasks t --num-fewshot 5 --output o"),
    ("megatron-sov generate --model M --prompt hi --tp 2",
     "megatron-sov generate M --prompt hi --set parallel.tp=2 --nproc 2"),
    (f"{SFT} --tensor-model-parallel-size 2 --context_parallel_size 2",
     f"{SFT} --set parallel.tp=2 --set parallel.cp=2 --nproc 4"),
    (f"{SFT} --lora_alpha 32 --lora_r 8", f"{SFT} --set lora.alpha=32 --set lora.rank=8"),
    ("megatron-sov pretrain qwen3-8b --data D --run R --training.steps 10 --optimizer.lr 3e-4",
     "megatron-sov pretrain qwen3-8b --data D --run R --set train.steps=10 --set optim.lr=3e-4"),
    (f"{SFT} --tensor-model-parallel-size ²", f"{SFT} --set 'parallel.tp=²'"),
    ("megatron-sov convert from-hf M", "megatron-sov convert from-hf M new-output"),
    ("megatron-sov submit qwen3-8b --cluster h100",
     "megatron-sov submit pretrain --cluster h100 --account ACCOUNT qwen3-8b --run new-run --data DIR"),
    ("sov-data pack --input X --tokenizer-model t --output-prefix o --append-eod",
     "sov-data pack --input X --tokenizer t --output o --eod append"),
    ("sov-tokenizer train --input x --model_prefix m --vocab_size 900 --model_type bpe",
     "sov-tokenizer train --input x --output m --vocab-size 900 --preset solar-open"),
    (f"{SFT} --resume_from_checkpoint r/checkpoints/step-5", "megatron-sov resume r"),
    ("megatron-sov pretrain R --data D --run N --resume_from_checkpoint r/checkpoints/step-5",
     "megatron-sov pretrain R --data D --run N --from r/checkpoints/step-5"),
    (f"{SFT} --set trainer.max_steps=9 --set trainer.devices=8 --set foo.bar=1",
     f"{SFT} --set train.steps=9 --nproc 8"),
    (f"{SFT} trainer.max_steps=9 +optim.lr=1e-4", f"{SFT} --set train.steps=9 --set optim.lr=1e-4"),
    (f"{SFT} --set optim.lr = 1e-4", f"{SFT} --set optim.lr=1e-4"),
    (f"{SFT} --set lora.dropout=0.1", SFT),
    (f"{SFT} --set lora.targets=q_proj,v_proj", f"{SFT} --set 'lora.targets=[\"q_proj\", \"v_proj\"]' "
     "--set lora.rank=16"),
    ("megatron-sov extend x-extend --from M --data D --run R --to 1024",
     "megatron-sov extend x-extend --from M --data D --run R --set extend.stages.0.seq_len=1024"),
    ("megatron-sov pretrain --num-layers 4 --data D --run R",
     "megatron-sov pretrain RECIPE --set model.num_layers=4 --data D --run R"),
    ("megatron-sov pretrain x --data 0.7 a 0.3 b --run R",
     "megatron-sov pretrain x --data a:0.7 --data b:0.3 --run R"),
    ("megatron-sov pretrain x --data D --run R --fp8",
     "megatron-sov pretrain x --data D --run R --set train.fp8=tensorwise --set train.precision=bf16"),
    ("megatron-sov pretrain x --data D --save c --load c --run R",
     "megatron-sov pretrain x --data D --run c --resume"),
    ("megatron-sov generate M Hello", "megatron-sov generate M --prompt Hello"),
    ("megatron-sov plan qwen3-8b --gpu-type H100 --num-gpus 8",
     "megatron-sov plan qwen3-8b --cluster h100 --nodes 1"),
    ("megatron-sov --dry-run sft --from M", "megatron-sov sft --from M --dry-run --run new-run"),
    ("sov-data pack --tokenizer T --input x --output o --format sharegpt",
     "sov-data pack --tokenizer T --input x --output o --format chat"),
    ("sov-data mix --input A B --weights 0.7 0.3 --output O", "sov-data mix A:0.7 B:0.3 --output O"),
    ("sov-data mix --input A:0.7 --input B:0.3 --output O", "sov-data mix A:0.7 B:0.3 --output O"),
])
def test_all_unknown_words_are_translated_into_one_command(typed: str, write: str,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    message = answer(typed, capsys).partition("\nthis line still has a fault")[0]
    assert message.splitlines()[-1].strip() == write


@pytest.mark.parametrize("line", [
    f"{SFT} --zzz 14", "megatron-sov plan qwen3-8b --wombats 14", "megatron-sov recipes --zebra",
    "sov-data zebra", "sov-tokenizer train --preset x --vocab-size 9 --input a --output b --quux"])
def test_a_word_without_similar_names_gets_no_suggestion(line: str,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" not in answer(line, capsys)


@pytest.mark.parametrize(("files", "command", "write"), [
    ({"events.jsonl": "", "config.json": "{}"}, "convert {} out", ["convert to-hf {} out"]),
    ({"config.json": "{}", "m.safetensors": ""}, "convert {} out", ["convert from-hf {} out"]),
    ({"latest_checkpointed_iteration.txt": "1"}, "convert {} out", ["convert from-megatron {} out"]),
    ({".metadata": "", "metadata.json": "{}"}, "convert {} out", ["convert from-megatron {} out"]),
    ({".metadata": ""}, "convert {} out", ["convert from-dcp {} out"]),
    ({"manifest.json": json.dumps({"kind": "checkpoint"})}, "convert {} out", ["convert to-hf {} out"]),
    ({"events.jsonl": "", "config.json": "{}"}, "convert {} --to hf --output out", ["convert to-hf {} out"]),
    ({}, "convert {} --to hf -o 'my out' --dtype bfloat16", ["convert to-hf {} 'my out' --dtype bfloat16"]),
    ({"config.json": "{}", "m.safetensors": ""}, "eval {}",
     ["eval ppl {} --data TOKENS", "eval lm {} --tasks TASKS --output scores.json"]),
])
def test_a_path_in_the_place_of_an_action_names_the_action(files: dict[str, str], command: str,
                                                           write: list[str], tmp_path: Path,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    write_files(files)
    message = answer(f"megatron-sov {command.format(tmp_path)}", capsys)
    # the folder has no model in it, which the line's check says
    lines = message.partition("\nthis line still has a fault")[0].splitlines()
    assert [line.strip() for line in lines[1:]] == [f"megatron-sov {line.format(tmp_path)}" for line in write]


@pytest.mark.parametrize(("typed", "proposed"), [
    ("report runs", "report runs/pretrain runs/more/sft"), ("resume runs", "resume runs/more/sft"),
    ("chat runs", "chat runs/more/sft"), ("convert to-hf runs out", "convert to-hf runs/more/sft out")])
def test_a_folder_of_runs_lists_the_runs(typed: str, proposed: str, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    for at, name in enumerate(("pretrain", "more/sft")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        events = tmp_path / "runs" / name / "events.jsonl"
        events.touch()
        os.utime(events, (at, at))
    message = answer(f"megatron-sov {typed}", capsys)
    assert "runs: is not " in message and "it holds the runs runs/pretrain, runs/more/sft" in message
    assert f"write\n  megatron-sov {proposed}\n" in message


def test_a_line_is_proposed_for_a_split_name_a_long_record_and_a_setting_without_effect() -> None:
    Path("my texts.jsonl").touch()
    with pytest.raises(UserError) as raised:
        list_files(Path("my"), print)
    assert raised.value.fix == Fix(words={"my": "my texts.jsonl"}, left_out=("texts.jsonl",))
    Path("long.jsonl").write_text('{\n "text": "a"\n}')
    assert fix_records(Path("long.jsonl"), "is not valid JSON") == Fix(
        words={"long.jsonl": "long-lines.jsonl"}, before=("jq -c . long.jsonl > long-lines.jsonl",))
    Path("judged.jsonl").write_text(2 * '{"prompt": "a", "completion": "b", "label": true}\n')
    assert fix_records(Path("judged.jsonl"), "turn such rows into pairs with `sov-data pairs`") == Fix(
        words={"judged.jsonl": "judged-pairs/pairs.jsonl"}, left_out=("--method kto",),
        before=("sov-data pairs --input judged.jsonl --output judged-pairs",))
    inert = SettingsProblem(ProblemCode.INERT, "lora.alpha", "has no effect", 32.0)
    assert SettingsError("", [inert]).fix == Fix(options=("--set", "lora.rank=16"))


AXOLOTL = """base_model: M
datasets: [{path: D, type: alpaca}]
adapter: lora
lora_r: 8
learning_rate: 0.0002
bf16: auto
num_epochs: 1
"""
TORCHTITAN = """[model]
flavor = "8B"
[optimizer]
lr = 3e-4
[training]
seq_len = 8192
steps = 1000
"""


@pytest.mark.parametrize(("file", "content", "typed", "write"), [
    ("a.yml", AXOLOTL, "megatron-sov sft --config a.yml --data D --run R",
     "megatron-sov sft --from M --set lora.rank=8 --set optim.lr=0.0002 --set train.precision=bf16 "
     "--set train.epochs=1 --data D --run R"),
    ("t.toml", TORCHTITAN, "megatron-sov pretrain qwen3-8b --job.config_file t.toml --data D --run R",
     "megatron-sov pretrain qwen3-8b --set optim.lr=0.0003 --set data.phases.0.seq_len=8192 "
     "--set train.steps=1000 --data D --run R")])
def test_settings_of_a_foreign_configuration_file_are_written_as_ours(
        file: str, content: str, typed: str, write: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(file).write_text(content)
    message = answer(typed, capsys).partition("\nthis line still has a fault")[0]
    assert f"{file}: is another program's configuration" in message
    assert message.splitlines()[-1].strip() == write


ALIASES = "a0: &a0 {x: null}\n" + "".join(
    f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}\n" for i in range(1, 40))


@pytest.mark.parametrize("content", [
    ALIASES, "train: {steps: 3}\n", "recipe: qwen3-8b\nlearning_rate: 3\n", "unknown: 1\n", "- 3\n",
    "learning_rate: [\n", "learning_rate: &a {b: *a}\n"])
def test_own_unknown_and_damaged_configuration_files_go_to_their_reader(
        content: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yml").write_text(content)
    assert "another program's" not in answer("megatron-sov pretrain qwen3-8b --config a.yml --data D --run R",
                                             capsys)


@pytest.mark.each("data", ["x", [1], {"phases": [{}]}, {"phases": "abc"}])
def test_a_length_is_a_multiple_of_that_of_a_model_whose_config_has_foreign_data(data: object) -> None:
    write_files({"hf/config.json": json.dumps({"data": data, "max_position_embeddings": 8})})
    assert multiply_context("hf", "4") == "32"


@pytest.mark.each("line", [
    "megatron-sov {}", "megatron-sov inspect {}", "megatron-sov generate {} --prompt {}",
    "megatron-sov sft {} --from {} --data {},{} --run {}", "megatron-sov convert to-hf {} {}",
    "megatron-sov submit {}", "sov-data {}", "sov-data pack --tokenizer {} --input {} --output {}",
    "sov-data run {} --output {}", "sov-tokenizer {}", "sov-tokenizer train --input en={} --output {}"])
def test_words_longer_than_a_file_name_give_one_sentence(
        line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: " in answer(line.replace("{}", "x" * 5000), capsys)


def test_a_line_without_options_reads_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "load_table", lambda: pytest.fail("words.yaml was read"))
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    assert words.translate_options(parser, ["RUN"]) == ["RUN"]
