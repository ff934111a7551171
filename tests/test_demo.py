"""`make demo`: the split of its chats, and commands that the programs accept."""

import json
import sys
from pathlib import Path

import pytest

from data_prep.cli import build_parser as sov_data
from megatron_sov import cli, recipes
from megatron_sov.base.command_line import Parser
from megatron_sov.base.settings import find_inert_settings, read_command_options
from megatron_sov.commands import COMMANDS
from megatron_sov.judge.rewards.surface import Format
from megatron_sov.model.config import apply_settings
from tokenizer.cli import build_parser as sov_tokenizer

sys.path.append(str(Path(__file__).parents[1]))
import demo

SOURCES = ["code", "english", "korean"]


def gather(root: Path, num_chats: int) -> None:
    """Write chats as `sov-data demo-corpus` does, with answers that contain characters which only Python
    treats as line ends."""
    (root / "corpus").mkdir()
    (root / "corpus/chat.jsonl").write_text("".join(json.dumps(
        {"messages": [{"role": "user", "content": f"What is {i}?"},
                      {"role": "assistant", "content": f"The number\u2028{i}."}]}, ensure_ascii=False) + "\n"
        for i in range(num_chats)))


@pytest.mark.parametrize(("num_chats", "expected"), [(4000, (32, 800, 3168)), (80, (10, 20, 50))])
def test_each_chat_is_used_once_and_a_rule_ranks_answers(tmp_path: Path, num_chats: int,
                                                         expected: tuple[int, ...]) -> None:
    gather(tmp_path, num_chats)
    demo.split_chats(tmp_path)
    folder = tmp_path / "conversations"
    asked, pairs, chats = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().rstrip("\n").split("\n")]
        for name in ("questions", "pairs", "chat"))
    assert (len(asked), len(pairs), len(chats)) == expected
    learned = [pair["prompt"] for pair in pairs] + [chat["messages"][0]["content"] for chat in chats]
    assert len({*learned, *(question["prompt"] for question in asked)}) == num_chats
    rule = Format(regex=demo.STRAIGHT)
    passes = [rule.score({"response": chat["messages"][1]["content"]}).reward for chat in chats]
    assert sum(passes) == len(chats) / 2
    for pair in pairs:
        assert pair["rejected"] == demo.OPENING + pair["chosen"]
        assert [rule.score({"response": pair[side]}).reward for side in ("chosen", "rejected")] == [1, 0]
    modified_ns = (folder / "pairs.jsonl").stat().st_mtime_ns
    demo.split_chats(tmp_path)
    assert (folder / "pairs.jsonl").stat().st_mtime_ns == modified_ns


@pytest.mark.parametrize("sources", [SOURCES, ["user"]])
def test_every_command_parses(tmp_path: Path, sources: list[str]) -> None:
    stages = [demo.corpus_stage(tmp_path, None), *demo.data_stages(tmp_path, sources),
              *demo.training_stages(tmp_path, sources), *demo.retrieval_stages(tmp_path, sources),
              *demo.judging_stages(tmp_path), *demo.report_stages(tmp_path, "What is it?")]
    assert len({stage.name for stage in stages}) == len(stages)
    for stage in stages:
        program, name, *rest = stage.command
        if program == "megatron-sov":
            parser = Parser()
            command, rest = cli.split_command([name, *rest])
            COMMANDS[command].load().add_arguments(parser)
            args = read_command_options(parser.parse_args(rest))
            if hasattr(args, "recipe"):
                config = apply_settings(recipes.get(args.recipe), args.settings)
                keys = [setting.partition("=")[0] for setting in args.settings]
                if name in ("pretrain", "extend"):  # the objectives of others are not in their recipes
                    assert not find_inert_settings(config, keys, {"command": name}), stage.name
        elif program != sys.executable:
            {"sov-data": sov_data, "sov-tokenizer": sov_tokenizer}[program]().parse_args([name, *rest])
