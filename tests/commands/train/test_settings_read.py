"""Settings that each kind of stage reads, against their declared conditions (`ACTS_WHEN`)."""

import dataclasses
import fnmatch
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main as sov_data
from megatron_sov.base.settings import find_inert_settings, get_inner_hint
from megatron_sov.chat.vocabulary import tokenizer_digest
from megatron_sov.cli import main
from megatron_sov.judge.rewards.registry import build_versioned_reward, request_reward
from megatron_sov.model.config import RolloutConfig, RunConfig, from_dict, setting_names
from megatron_sov.rollouts.prompts import read_prompts
from megatron_sov.rollouts.store import RolloutStore
from tests.typed_words import format_set_options

LOOP = ("train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=2", "data.heldout_tokens=128",
        "train.num_threads=1")
SMALL = (*LOOP, "model.vocab_size=368", "model.hidden_size=32", "model.num_layers=2", "optim.lr=0.0001",
         'data.phases=[{"name": "main", "seq_len": 128}]')
ROLLOUT: dict[str, Any] = {"rounds": 2, "prompts_per_round": 2, "samples_per_prompt": 4, "piece_prompts": 2,
                           "max_new_tokens": 12, "max_prompt_tokens": 6}

READ_WITHOUT_EFFECT = {
    "policy.*": "`PolicyConfig.parts` fills in all parts at once, whatever the objective",
    **dict.fromkeys(("rollout.rounds", "rollout.s[et]e*"), "read to find out whether there are rounds"),
    "preference.*": "read by `strength` and when a run is resumed; used if preferences are learned",
    "train.ramp_steps": "`batch_size_at` reads it before ramp_from_batch_size, which is 0",
    "train.steps": "read to count the steps of phases, which are made from rounds",
    "train.fp8_weights": "read to estimate memory; refused without train.fp8",
    "parallel.bucket_params": "megatron-core ignores the size without overlap_grad_reduce",
    "parallel.expert_dispatcher": "read to check that this machine has its kernels",
    "objective.options": "empty unless the objective is the user's own",
    "objective.*_weight": "passed on with `model.*_tokens`, and ignored without them",
    **dict.fromkeys(
        ("model.mtp_*", "model.norm_topk_prob", "model.router_bias"),
        "all settings are written to the configs of megatron-core and Hugging Face"),
    "media.*_from": "folders of encoders; these models have no encoders",
    **dict.fromkeys(
        ("gpu.cuda_graphs", "gpu.exchange_sms", "gpu.grad_dtype", "gpu.linear_attention", "gpu.profile*",
         "gpu.permute_fusion", "gpu.router_fusion", "gpu.expert_imbalance", "gpu.expert_spill",
         "gpu.force_even_routing"),
        "all settings are written to megatron-core's config, and memory is estimated from all"),
    "guards.routing_every_steps": "read before the number of layers with experts, which is 0",
    "lora.dora": "passed on with the rank",
    "data.packing": "passed on to `SampleOrder`, which uses it for plain text",
    "data.over_long": "passed on to `SampleOrder`, which uses it for conversations",
    "train.epochs": "read for the warning about many epochs",
}
"""Setting that a stage reads although its `ACTS_WHEN` is false -> reason why the value has no effect."""
NEVER_READ = {
    "guards.*": "read after 20 steps, or after a fault",
    "needle.*_weight": "read when a needle document is drawn",
    "rollout.*": "read by the commands that generate responses (`rl run`, `rl generate`)",
    "train.max_hours": "read by commands, not by the processes of a launcher",
    "train.tokens": "the length of these runs is set in steps",
    "model.*.*": "settings of blocks that these models do not have",
}
"""Setting that has an effect, but is read by none of the stages below -> reason."""


@dataclass(frozen=True)
class StageReads:
    """A stage that has run."""

    config: RunConfig
    facts: dict[str, Any]
    reads: dict[str, set[str]]
    """Setting -> the functions that read it."""

    def inert(self) -> set[str]:
        """Return the settings whose declared condition for an effect is false."""
        return {problem.key for problem in find_inert_settings(self.config, setting_names(), self.facts)}


def iter_setting_groups(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[type, str]]:
    """Yield each settings class with the prefix of its keys."""
    yield cls, prefix
    for field in dataclasses.fields(cls):
        inner = get_inner_hint(cls, field.name)
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from iter_setting_groups(inner, f"{prefix}{field.name}.")


@contextmanager
def recorded_reads() -> Iterator[dict[str, set[str]]]:
    """Record which functions read which settings, except functions that check, copy or write settings."""
    reads: dict[str, set[str]] = defaultdict(set)

    def build_reader(prefix: str, names: frozenset[str]) -> Any:
        def read_field(settings: Any, name: str) -> Any:
            if name in names:
                code = sys._getframe(1).f_code
                _, ours, file = code.co_filename.rpartition("megatron_sov/")
                checks = file.startswith(("base/", "model/recipes/")) or "problems" in code.co_qualname
                if ours and not checks and "_rules" not in code.co_qualname:
                    reads[prefix + name].add(f"{file}:{code.co_qualname}")
            return object.__getattribute__(settings, name)
        return read_field

    with pytest.MonkeyPatch.context() as patch:
        for cls, prefix in iter_setting_groups():
            names = frozenset(field.name for field in dataclasses.fields(cls))
            patch.setattr(cls, "__getattribute__", build_reader(prefix, names), raising=False)
        yield reads


class StageRunner:
    """Runs tiny stages in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished: dict[str, StageReads] = {}

    def run(self, name: str, command: str, formats: list[str], *argv: str) -> None:
        run = self.folder / name
        with recorded_reads() as reads:
            assert main([*command.split(), *argv, "--run", str(run)]) == 0
        config = from_dict(json.loads((run / "config.json").read_text()))
        facts = {"command": command, **({"--data": formats} if formats else {"--validation": None})}
        self.finished[name] = StageReads(config, facts, dict(reads))

    def train(self, name: str, command: str, formats: list[str], data: Path, *more: str) -> None:
        """Run a stage on data, of the dense model unless `more` names another recipe first."""
        recipe, *more_words = more if more and not more[0].startswith("-") else ("tiny-qwen3", *more)
        self.run(name, command, formats, recipe, "--data", str(data), *format_set_options(SMALL),
                 *more_words)


@pytest.fixture
def stages(one_rank: None, packed_data: Any, token_shards: Path, write_round: Any, tmp_path: Path) -> Any:
    """Run the stages below; return name -> `StageReads`."""
    runner, start = StageRunner(tmp_path), ("--from", str(tmp_path / "dense"))
    runner.train("dense", "pretrain", ["text"], packed_data.text)
    runner.train("experts", "pretrain", ["text"], packed_data.text, "tiny-solar-open")
    runner.train("sft", "sft", ["chat"], packed_data.chats, *start)
    runner.train("lora", "sft", ["chat"], packed_data.chats, *start, *format_set_options(["lora.rank=2"]))
    runner.train("distill", "distill", ["chat"], packed_data.chats, *start, "--teacher", start[1])
    runner.train("prefer", "prefer", ["preference"], _pack_pairs(packed_data, tmp_path), *start)
    runner.train("short", "pretrain", ["text"], token_shards, "tiny-solar-open",
                *format_set_options(["model.vocab_size=1024",
                                     'data.phases=[{"name": "main", "seq_len": 64}]']))
    runner.run("extend", "extend", ["text"], "tiny-solar-open", "--data", str(token_shards), "--from",
              str(tmp_path / "short"),
              *format_set_options([*LOOP, "needle.samples=1", "needle.depths=[0.5]"]))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(4)))
    tokenizer = tokenizer_digest(packed_data.text / "tokenizer")
    store = RolloutStore.create(tmp_path / "store", tokenizer, 368)
    for number in (1, 2):
        write_round(store, read_prompts(prompts), RolloutConfig(**ROLLOUT), number,
                    build_versioned_reward(request_reward("repetition", {})).version)
    runner.run("rounds", "rl train", [], "tiny-qwen3", "--store", str(store.path), "--prompts", str(prompts),
              "--reward", "repetition", *start, *format_set_options([*LOOP[1:], "optim.lr=1e-6"]),
              *format_set_options((f"rollout.{name}={value}" for name, value in ROLLOUT.items())))
    return runner.finished


def _pack_pairs(packed_data: Any, folder: Path) -> Path:
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(
        {"prompt": f"{i} plus 1?", "chosen": f"{i + 1}.", "rejected": f"{i}."}) for i in range(40)))
    assert sov_data(["pack", "--tokenizer", str(packed_data.tokenizer), "--heldout", "0.2", "--workers", "1",
                     "--format", "preference", "--input", str(folder / "pairs.jsonl"), "--output",
                     str(folder / "pairs")]) == 0
    return folder / "pairs"


def find_unlisted_keys(keys: set[str], reasons: dict[str, str]) -> set[str]:
    return {key for key in keys if not any(fnmatch.fnmatch(key, pattern) for pattern in reasons)}


@pytest.mark.deep
def test_stages_read_exactly_the_settings_with_effect(stages: dict[str, StageReads]) -> None:
    read_without_effect: dict[str, tuple[str, set[str]]] = {}
    with_effect: set[str] = set()
    read: set[str] = set()
    for name, stage in stages.items():
        inert = stage.inert()
        read_without_effect |= {key: (name, stage.reads[key]) for key in inert & stage.reads.keys()}
        with_effect |= {*setting_names()} - inert
        read |= stage.reads.keys()
    assert find_unlisted_keys({*read_without_effect}, READ_WITHOUT_EFFECT) == set(), read_without_effect
    unread = with_effect - read
    assert find_unlisted_keys(unread, NEVER_READ) == set()
    # each pattern in the tables still matches a setting
    assert [pattern for pattern in READ_WITHOUT_EFFECT
            if not fnmatch.filter(read_without_effect, pattern)] == []
    assert [pattern for pattern in NEVER_READ if not fnmatch.filter(unread, pattern)] == []
