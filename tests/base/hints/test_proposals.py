"""Command lines with several faults: the message names every fault, and the proposed line has no fault."""

import json
from collections.abc import Callable

import pytest

from megatron_sov.base.documents.layouts import describe_foreign_turns
from megatron_sov.base.errors import Fix, RowProblems, UserError
from megatron_sov.base.hints.commands import unwrap_launcher
from megatron_sov.base.hints.lines import apply_fix, propose_line
from megatron_sov.base.hints.paths import find_path_faults
from tests.base.hints.test_lines import list_proposed_commands
from tests.base.hints.test_words import write_files


def propose(typed: str, check: Callable[[list[str]], None], fault: UserError) -> str:
    """Return the message about a typed line with a first fault; `check` finds faults of corrected lines."""
    return str(propose_line("sov-data", typed.split(), fault, check))


def test_a_fault_that_stays_is_named_after_the_line() -> None:
    def check(line: list[str]) -> None:
        raise UserError("d: is damaged")

    assert propose("pack", check, UserError("a", Fix(options=("--b", "1")))) == (
        "a; write\n  sov-data pack --b 1\nthis line still has a fault: d: is damaged")


def test_a_line_with_the_same_fault_is_not_proposed() -> None:
    def check(line: list[str]) -> None:
        raise UserError("recipe x: tp = 3 must divide 4")

    fault = UserError("recipe x: 2 problems\n  sp must be true\n  tp = 3 must divide 4",
                      Fix(options=("--set", "sp=true")))
    assert propose("pack", check, fault) == fault.sentence


@pytest.mark.parametrize(("message", "write"), [
    ("--samples 4: needs --temperature above 0; add --temperature 1", "sov-data pack --temperature 1"),
    ("x: set train.steps=5", "sov-data pack --set train.steps=5"),
    ("x: pass --data DIR", ""), ("x: pass --data NAME=FILE", ""), ("x: is damaged", "")])
def test_a_recommended_value_is_in_the_line(message: str, write: str) -> None:
    """`write`: the proposed line; "" if the message recommends no value, or only a placeholder."""
    error = propose_line("sov-data", ["pack"], UserError(message), lambda line: None)
    assert list_proposed_commands(str(error)) == [write] * bool(write)


def test_later_faults_are_found_with_a_placeholder_value() -> None:
    """The first fault has only a stand-in, with which the check finds the second fault, which has a fix."""
    def check(line: list[str]) -> None:
        if "math" not in line:
            raise UserError("reward 'mine': does not exist", Fix(stand_ins={"mine": "math"}))
        if "m=ppo" in line:
            raise UserError("m: is grpo here", Fix(words={"m=ppo": "m=grpo"}))

    typed = ["run", "--reward", "mine", "--set", "m=ppo"]
    with pytest.raises(UserError) as first:
        check(typed)
    assert str(propose_line("sov-data", typed, first.value, check)) == (
        "m: is grpo here; write\n  sov-data run --reward mine --set m=grpo\n"
        "this line still has a fault: reward 'mine': does not exist")


@pytest.mark.each("removed", [["--set", "a.b=1", "--nproc", "2"], ["--set=a.b=1", "--nproc=2"]])
def test_an_option_leaves_with_its_value(removed: list[str]) -> None:
    line = ["serve", "hf", *removed, "--set", "c.d=2"]
    assert apply_fix("megatron-sov", line, Fix(left_out=("--set a.b=1", "--nproc 2"))) == [
        "serve", "hf", "--set", "c.d=2"]


@pytest.mark.parametrize(("line", "fixes"), [
    ("sft --from Org/Name-1B --data Org/chats --run r", [
        Fix(words={"Org/chats": "chats"},
            before=("hf download Org/chats --repo-type dataset --local-dir chats",)),
        Fix(words={"Org/Name-1B": "Name-1B"}, before=("hf download Org/Name-1B --local-dir Name-1B",))]),
    ("pretrain x --data tokens/manifest.json --run r", [Fix(words={"tokens/manifest.json": "tokens"})]),
    ("pretrain x --data tok --run tokens", [Fix(options=("--data", "tokens")),
                                            Fix(options=("--run", "tokens-run"))]),
    ("pretrain x --data texts --run r", [Fix(words={"texts": "texts-tokens"}, before=(
        "sov-data pack --tokenizer tok --input texts --output texts-tokens",))]),
    ("eval pairs run --data p.jsonl", [Fix(words={"p.jsonl": "p-tokens"}, before=(
        "sov-tokenizer import run/checkpoints/step-10/tokenizer --output tokenizer-tokenizer",
        "sov-data pack --tokenizer tokenizer-tokenizer --input p.jsonl --heldout 0.5 --format preference "
        "--output p-tokens"))]),
    ("sft --from=hf --data DIR --run new", [])])
def test_paths_are_judged_without_running_anything(line: str, fixes: list[Fix]) -> None:
    write_files({"tokens/manifest.json": json.dumps({"kind": "tokens"}), "texts/a.txt": "a",
                 "tok/manifest.json": json.dumps({"kind": "tokenizer"}),
                 "run/checkpoints/step-9/tokenizer/tokenizer.json": "{}",
                 "run/checkpoints/step-10/tokenizer/tokenizer.json": "{}",
                 "p.jsonl": json.dumps({"instruction": "a", "chosen": "b", "rejected": "c"}),
                 "hf/config.json": "{}"})
    found = [fault.fix for _, fault in find_path_faults("megatron-sov", line.split())]
    assert sorted(map(repr, found)) == sorted(map(repr, fixes))


@pytest.mark.parametrize(("typed", "meant"), [
    ("axolotl train a.yml", "train a.yml"), ("trl sft --a b", "sft --a b"), ("vllm serve M", "serve M"),
    ("lm_eval --model hf --tasks t", "eval lm --model hf --tasks t"), ("llamafactory-cli train", "train"),
    ("torchrun --nproc_per_node=8 -m megatron_sov sft --data d", "sft --data d --nproc 8"),
    ("accelerate launch --num_processes 4 sft.py --a b", "sft --a b --nproc 4"),
    ("torchrun --nnodes 2 --nproc_per_node 8 sft.py --a b", "sft --a b --nnodes 2 --nproc 8"),
    ("accelerate launch -m lm_eval --tasks t", "eval lm --tasks t"),
    ("deepspeed --num_gpus 2 run_clm.py --a b", "clm --a b --nproc 2"),
    ("accelerate launch -m axolotl.cli.train a.yml", "train a.yml"),
    ("python -m megatron_sov sft", "sft"), ("megatron-sov sft", "sft")])
def test_launchers_are_unwrapped(typed: str, meant: str) -> None:
    assert unwrap_launcher(typed.split()) == meant.split()


def test_own_commands_are_not_read_as_launchers() -> None:
    assert unwrap_launcher(["serve", "hf"]) is None


def test_turns_of_foreign_names_cannot_be_named() -> None:
    record = {"id": 1, "utterances": [{"speaker": "a", "text": "b"}]}
    assert "'utterances' is a list of turns with 'speaker' and 'text'" in describe_foreign_turns(record)
    assert describe_foreign_turns({"messages": [{"role": "user", "content": "b"}]}) == ""


def test_equal_problems_of_rows_are_one_line() -> None:
    problems = RowProblems()
    for number in range(1, 21):
        problems.add(f"line {number}", "has no 'prompt'")
    problems.add("line 30", "is not JSON")
    assert problems.format("f.jsonl", "correct them") == (
        "f.jsonl: 21 bad rows; correct them\n  lines 1, 2, 3 and 17 more: has no 'prompt'\n"
        "  line 30: is not JSON")
