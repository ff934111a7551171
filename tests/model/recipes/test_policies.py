"""Published reinforcement-learning runs: their values, and the settings that they leave open."""

from fnmatch import fnmatchcase

import pytest

from megatron_sov.model.config import apply_settings
from megatron_sov.model.config.run import add_rounds
from megatron_sov.model.families.count import count_params
from megatron_sov.model.recipes import TINY, get, names, sources
from megatron_sov.model.recipes.sources import list_settings

RUNS = [name for name in names() if get(name).objective.name == "policy"]
LACKING = {"k-exaone-236b-rl": ("policy.clip_high=1.7",),
           **dict.fromkeys((f"vibethinker-1.5b-{stage}" for stage in ("math-16k", "math-32k", "code")),
                           ("policy.clip_low=0.2", "policy.clip_high=0.2", "policy.mgpo_lambda=1"))}
"""Recipe -> unpublished settings, which a run must set; the test's values are arbitrary."""


@pytest.mark.each("name", RUNS)
def test_a_policy_is_complete_with_its_unpublished_settings(name: str) -> None:
    config, lacking = get(name), LACKING.get(TINY.get(name, name), ())
    ranks = max(config.parallel.ranks_per_replica, config.parallel.ranks_per_expert_replica)
    assert sorted(problem.key for problem in config.problems(ranks)) == sorted(
        setting.partition("=")[0] for setting in lacking)
    whole = add_rounds(apply_settings(config, list(lacking)))
    assert whole.problems(ranks) == []
    assert whole.train.steps == (config.rollout.rounds * config.rollout.steps_per_round)


@pytest.mark.each("name", [name for name in RUNS if name in TINY])
def test_a_tiny_run_keeps_the_method_and_is_small(name: str) -> None:
    big, tiny = get(TINY[name]), get(name)
    assert tiny.policy.method == big.policy.method and tiny.optim.groups == big.optim.groups
    assert (tiny.policy.clip_low, tiny.policy.clip_high) == (big.policy.clip_low, big.policy.clip_high)
    assert tiny.rollout.rounds == 2 and tiny.rollout.steps_per_round == big.rollout.steps_per_round


def test_typhoons_two_runs_differ_in_updates_lengths_and_text() -> None:
    single, agent = ({s.key: s.value for s in list_settings(get(f"typhoon-s-4b-legal{end}"), {})}
                     for end in ("", "-agent"))
    changed = {key: (single[key], agent[key]) for key in single if single[key] != agent[key]}
    assert changed == {
        "policy.knowledge_batch_size": (64, 16), "rollout.steps_per_round": (1, 4),
        "rollout.max_new_tokens": (4096, 8192), "train.steps": (100, 400),
        "data.phases.0.seq_len": (6144, 10240)}


@pytest.mark.each(("name", "published", "chosen"), [
    ("typhoon-s-4b-legal", ("policy.*", "rollout.temperature", "optim.lr"), ("rollout.rounds",)),
    ("vibethinker-1.5b-math-16k", ("policy.*", "rollout.max_new_tokens"),
     ("rollout.samples_per_prompt", "optim.lr")),
    ("solar-open-102b-rl", ("policy.*", "rollout.steps_per_round"),
     ("rollout.prompts_per_round", "optim.lr")),
    ("k-exaone-236b-rl", ("policy.method", "policy.kl", "optim.groups.*", "model.router_bias_update_rate"),
     ("rollout.*", "optim.lr", "optim.name")),
])
def test_unpublished_values_are_marked(name: str, published: tuple[str, ...],
                                       chosen: tuple[str, ...]) -> None:
    for patterns, kind in ((published, "published"), (chosen, "ours")):
        kinds = {s.key: s.source.kind for s in list_settings(get(name), sources(name))
                 if s.source.kind != "default" and any(fnmatchcase(s.key, pattern) for pattern in patterns)}
        assert kinds and set(kinds.values()) == {kind}


def test_k_exaones_router_stays_as_it_is() -> None:
    config = get("k-exaone-236b-rl")
    assert [(g.pattern, g.frozen) for g in config.optim.groups] == [("*router.weight", True)]
    assert config.model.router_bias_update_rate == 0 and config.policy.method == "agapo"


# HyperCLOVA X 8B Omni: sizes and vocabulary as published, stages in the published order.


NAMES = [f"hyperclova-omni-8b{stage}" for stage in ("", "-continuous", "-sft")]


def test_parameters_are_those_of_the_published_sizes() -> None:
    """36 x 4096, 32/8 heads of 128, FFN 12288 and 200,704 ids: 8.59 B, published as 8 B; one more layer
    predicts a second token."""
    attention, feed_forward, norms = 4096 * 128 * (32 + 8 + 8) + 32 * 128 * 4096, 3 * 4096 * 12288, 2 * 4096
    layer = attention + feed_forward + norms
    count = count_params(get(NAMES[0]).model)
    assert count.total == 2 * 200_704 * 4096 + 36 * layer + 4096 == 8_590_233_600
    assert count.mtp == layer + 2 * 4096 * 4096 + 3 * 4096


def test_the_vocabulary_is_divided_as_published() -> None:
    """Text below 128,606, then 6,561 tokens for audio, a free id, and 65,536 tokens for images."""
    model = get(NAMES[0]).model
    assert model.audio_tokens is not None and model.image_tokens is not None
    assert (model.audio_tokens.first, model.audio_tokens.size) == (128_606, 3 ** 8)
    assert (model.image_tokens.first, model.image_tokens.size) == (135_168, 2 ** 16)
    assert model.image_tokens.first - model.audio_tokens.end == 1
    assert model.image_tokens.end == model.vocab_size == 200_704


def test_encoders_are_published_and_placeholders_are_text_tokens() -> None:
    model = get(NAMES[1]).model
    assert model.vision is not None and model.audio is not None
    vision = model.vision
    assert (vision.num_layers, vision.hidden_size, vision.num_heads, vision.patch_size) == (32, 1280, 16, 14)
    assert vision.full_attention_layers == (7, 15, 23, 31)
    assert (model.audio.num_layers, model.audio.hidden_size, model.audio.num_heads, model.audio.num_mels,
            model.audio.slots) == (32, 1280, 20, 128, 750)  # 30 seconds x 25 slots
    for name in (NAMES[1], "tiny-hyperclova-omni-continuous"):
        model = get(name).model
        assert model.vision and model.audio and model.audio_tokens
        ids = (*model.vision.placeholder_ids, *model.audio.placeholder_ids)
        assert len(set(ids)) == 3 and max(ids) < model.audio_tokens.first


@pytest.mark.parametrize("tiny", ["", "tiny-"])
def test_stages_have_the_published_order(tiny: str) -> None:
    """Discrete tokens come before features of encoders, fine-tuning has four phases, and all stages have one
    architecture."""
    runs = [get(tiny + name) for name in NAMES]
    assert [[p.name for p in run.data.phases] for run in runs] == [
        ["text", "discrete"], ["continuous", "long"],
        ["conversation", "multimodal", "video-long", "intent-think"]]
    assert [(r.media.train_encoders, r.media.train_adapters) for r in runs] == [
        (False, False), (True, True), (False, True)]
    assert [r.objective.name for r in runs] == ["lm", "lm", "sft"]
    assert runs[2].objective.text_coeff > 0, "fine-tuning also learns plain text"
    assert len({r.model for r in runs}) == 1 and runs[0].model.num_mtp_layers == 1
    if not tiny:
        last_phases = [phase for run in (runs[0], runs[2]) for phase in run.data.phases[-2:]]
        assert all("text" in phase.blend for phase in last_phases)
        assert runs[1].data.phases[-1].seq_len == runs[0].model.max_position_tokens == 32768


def test_typhoons_distillation_is_on_policy_at_both_sizes() -> None:
    for name, prompts in (("typhoon-s-8b-opd", 64), ("tiny-typhoon-s-opd", 8)):
        run = get(name)
        assert (run.objective.name, run.policy.method, run.policy.on_policy_share) == ("policy", "gkd", 0.25)
        assert (run.rollout.prompts_per_round, run.rollout.samples_per_prompt, run.rollout.top_p) == (
            prompts, 1, 0.95)
