"""Which settings each kind of stage reads, against the conditions under which settings are declared to act."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main as sov_data
from megatron_sov.base.settings import find_inert, hint_below
from megatron_sov.cli import main
from megatron_sov.judge.rewards.registry import make, order
from megatron_sov.model.config import RolloutConfig, RunConfig, from_dict, setting_names
from megatron_sov.rollouts.prompts import read_prompts
from megatron_sov.rollouts.store import RolloutStore

TINY = ("model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "train.steps=2",
        "train.global_batch_size=2", "train.micro_batch_size=2", "data.heldout_tokens=128",
        "train.num_threads=1", 'data.phases=[{"name": "main", "seq_len": 128}]')
NO_READERS = ("<string>", "dataclasses.py", "base/settings/", "copy.py", "model/recipes/", "artifacts.py")
NO_READING = ("problems", "_rules", "_take_min", "_spread", "apply_settings")


def config_classes(cls: type = RunConfig, below: str = "") -> Iterator[tuple[str, type]]:
    """Yield the group of settings and its class, of all groups that are always there."""
    yield below, cls
    for field in dataclasses.fields(cls):
        inner = hint_below(cls, field.name)
        if dataclasses.is_dataclass(inner):
            yield from config_classes(inner, f"{below}{field.name}.")


@contextmanager
def recorded_reads() -> Iterator[dict[str, set[str]]]:
    reads: dict[str, set[str]] = defaultdict(set)
    groups = {cls: group for group, cls in config_classes()}

    def recorder(group: str, names: frozenset[str]) -> Any:
        def __getattribute__(self: Any, name: str) -> Any:
            if name in names:
                code = sys._getframe(1).f_code
                if not any(part in code.co_filename for part in NO_READERS) and not any(part in code.co_qualname for part in NO_READING):
                    reads[f"{group}{name}"].add(f"{code.co_filename.partition('megatron_sov/')[2]}:{code.co_name}")
            return object.__getattribute__(self, name)
        return __getattribute__

    with pytest.MonkeyPatch.context() as patch:
        for cls, group in groups.items():
            names = frozenset(field.name for field in dataclasses.fields(cls))
            patch.setattr(cls, "__getattribute__", recorder(group, names), raising=False)
        yield reads


def words(*settings: str) -> list[str]:
    return [word for setting in (*TINY, *settings) for word in ("--set", setting)]


def test_explore(one_rank: None, packed_data: Any, tmp_path: Path, write_round: Any, token_shards: Path) -> None:
    import time
    from megatron_sov.base.digests import file_digest

    out = {}

    def stage(name: str, *argv: str) -> None:
        t = time.time()
        with recorded_reads() as reads:
            assert main([*argv, "--run", str(tmp_path / name)]) == 0
        out[name] = {k: sorted(v) for k, v in reads.items()}
        out[name]["seconds"] = time.time() - t
        run = tmp_path / name / "config.json"
        out[name]["config"] = json.loads(run.read_text())

    text, chats = str(packed_data.text), str(packed_data.chats)
    start = ["--from", str(tmp_path / "pretrain")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(
        {"prompt": f"{i} plus 1?", "chosen": f"{i + 1}.", "rejected": f"{i}, I am sure."}) for i in range(40)))
    assert sov_data(["pack", "--tokenizer", str(packed_data.tokenizer), "--heldout", "0.2", "--workers", "1", "--format",
                     "preference", "--input", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "pairs")]) == 0
    stage("pretrain", "pretrain", "tiny-qwen3", "--data", text, *words())
    stage("experts", "pretrain", "tiny-solar-open", "--data", text, *words())
    stage("sft", "sft", "tiny-qwen3", "--data", chats, *start, *words("optim.lr=0.001"))
    stage("lora", "sft", "tiny-qwen3", "--data", chats, *start, *words("lora.rank=2", "optim.lr=0.001"))
    stage("prefer", "prefer", "tiny-qwen3", "--data", str(tmp_path / "pairs"), *start, *words("optim.lr=0.0001"))
    stage("distill", "distill", "tiny-qwen3", "--data", chats, "--teacher", str(tmp_path / "pretrain"), *start, *words("optim.lr=0.001"))
    stage("short", "pretrain", "tiny-solar-open", "--data", str(token_shards), *words("model.vocab_size=1024", 'data.phases=[{"name": "main", "seq_len": 64}]'))
    stage("extend", "extend", "tiny-solar-open", "--data", str(token_shards), "--from", str(tmp_path / "short"),
          *[w for s in TINY if "phases" not in s and "model" not in s for w in ("--set", s)], "--set", "needle.samples=1", "--set", "needle.depths=[0.5]")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(4)))
    store = RolloutStore.create(tmp_path / "store", file_digest(packed_data.text / "tokenizer/tokenizer.json", "sha256"), 368)
    R = dict(rounds=2, prompts_per_round=2, samples_per_prompt=4, piece_prompts=2, max_new_tokens=12, max_prompt_tokens=6)
    for number in (1, 2):
        write_round(store, read_prompts(tmp_path / "prompts.jsonl"), RolloutConfig(**R), number, make(order("repetition", {})).version)
    stage("rl", "rl", "train", "tiny-qwen3", "--store", str(store.path), "--prompts", str(tmp_path / "prompts.jsonl"), "--reward", "repetition",
          *start, *[w for s in TINY if "train.steps" not in s and "phases" not in s for w in ("--set", s)], "--set", "optim.lr=1e-6", "--set", 'data.phases=[{"name": "main", "seq_len": 32}]',
          *[w for k, v in R.items() for w in ("--set", f"rollout.{k}={v}")])
    Path("/tmp/acts_reads.json").write_text(json.dumps(out))
