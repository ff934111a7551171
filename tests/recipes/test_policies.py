"""Published runs of reinforcement learning: their values, and what they leave to be set."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from megatron_sov.config import apply_settings
from megatron_sov.config.rounds import with_rounds
from megatron_sov.recipes import TINY, get, names, sources
from megatron_sov.recipes.sources import settings

RUNS = [name for name in names() if get(name).objective.name == "policy"]
LACKING = {"k-exaone-236b-rl": ("policy.clip_high=1.7",),
           **dict.fromkeys((f"vibethinker-1.5b-{stage}" for stage in ("math-16k", "math-32k", "code")),
                           ("policy.clip_low=0.2", "policy.clip_high=0.2", "policy.mgpo_lambda=1"))}
"""Recipe -> what was not published of it, so that a run has to set it; the values mean nothing."""


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_whole_with_what_was_not_published(name: str) -> None:
    config, lacking = get(name), LACKING.get(TINY.get(name, name), ())
    ranks = max(config.parallel.ranks_per_replica, config.parallel.ranks_per_expert_replica)
    assert sorted(problem.key for problem in config.problems(ranks)) == sorted(
        setting.partition("=")[0] for setting in lacking), "every one is asked for"
    whole = with_rounds(apply_settings(config, list(lacking)))
    assert whole.problems(ranks) == [] and whole.train.steps == (
        config.rollout.rounds * config.rollout.steps_per_round)


@pytest.mark.parametrize("name", [name for name in RUNS if name in TINY])
def test_a_tiny_run_keeps_the_method_and_is_small(name: str) -> None:
    big, tiny = get(TINY[name]), get(name)
    assert tiny.policy.method == big.policy.method and tiny.optim.groups == big.optim.groups
    assert (tiny.policy.clip_low, tiny.policy.clip_high) == (big.policy.clip_low, big.policy.clip_high)
    assert tiny.rollout.rounds == 2 and tiny.rollout.steps_per_round == big.rollout.steps_per_round


def test_typhoons_two_runs_differ_in_updates_lengths_and_text() -> None:
    single, agent = ({s.key: s.value for s in settings(get(f"typhoon-s-4b-legal{end}"), {})}
                     for end in ("", "-agent"))
    changed = {key: (single[key], agent[key]) for key in single if single[key] != agent[key]}
    assert changed == {
        "policy.knowledge_batch_size": (64, 16), "rollout.steps_per_round": (1, 4),
        "rollout.max_new_tokens": (4096, 8192), "train.steps": (100, 400),
        "data.phases.0.seq_len": (6144, 10240)}


@pytest.mark.parametrize(("name", "published", "chosen"), [
    ("typhoon-s-4b-legal", ("policy.*", "rollout.temperature", "optim.lr"), ("rollout.rounds",)),
    ("vibethinker-1.5b-math-16k", ("policy.*", "rollout.max_new_tokens"),
     ("rollout.samples_per_prompt", "optim.lr")),
    ("solar-open-102b-rl", ("policy.*", "rollout.steps_per_round"),
     ("rollout.prompts_per_round", "optim.lr")),
    ("k-exaone-236b-rl", ("policy.method", "policy.kl", "optim.groups.*", "model.router_bias_update_rate"),
     ("rollout.*", "optim.lr", "optim.name")),
])
def test_what_nobody_published_does_not_claim_to_be(name: str, published: tuple[str, ...],
                                                    chosen: tuple[str, ...]) -> None:
    for patterns, kind in ((published, "published"), (chosen, "ours")):
        kinds = {s.key: s.source.kind for s in settings(get(name), sources(name))
                 if s.source.kind != "default" and any(fnmatchcase(s.key, pattern) for pattern in patterns)}
        assert kinds and set(kinds.values()) == {kind}


def test_k_exaones_router_stays_as_it_is() -> None:
    config = get("k-exaone-236b-rl")
    assert [(g.pattern, g.frozen) for g in config.optim.groups] == [("*router.weight", True)]
    assert config.model.router_bias_update_rate == 0 and config.policy.method == "agapo"
