"""Every recipe builds and is valid, and a tiny recipe keeps the structure of the large one."""

import importlib.util
import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from megatron_sov.base.errors import UserError
from megatron_sov.model import recipes
from megatron_sov.model.config import OptimConfig, PhaseConfig, YarnConfig, apply_settings, from_dict
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.count import count_params, layer_weights
from megatron_sov.model.families.family import COMMON_VALUES, extract_text_config
from megatron_sov.model.recipes import TINY, TINY_SOURCE, get, names, sources
from megatron_sov.model.recipes.extension import extend_model
from megatron_sov.model.recipes.sources import (
    DEFAULT, YOURS, Sources, derive_sources, label_changes, list_settings, ours, published, select_used)

STRUCTURE = (
    "family", "num_dense_layers", "num_shared_experts", "routed_scaling_factor", "router_bias_update_rate",
    "seq_aux_loss_coeff", "attention_pattern", "rope_on_global", "rope_theta", "qk_norm", "norm_eps",
    "num_mtp_layers", "mtp_loss_coeff",
)
"""Model fields that are design choices, not sizes; tiny recipes must not change them."""


@pytest.mark.each("name", names())
def test_every_recipe_builds_and_is_valid(name: str) -> None:
    config = get(name)
    assert config.recipe == name
    num_ranks = math.lcm(config.parallel.ranks_per_replica, config.parallel.ranks_per_expert_replica)
    # recipes may leave settings open: test_policies.py lists them
    assert [p for p in config.problems(num_ranks)
            if not p.rule.startswith("is missing: ")] == []
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_recipe_has_a_tiny_variant() -> None:
    assert sorted(TINY.values()) == [name for name in names() if not name.startswith("tiny-")]
    assert all(get(f"tiny-{big}") == get(tiny) for tiny, big in TINY.items())


@pytest.mark.each("name", TINY)
def test_tiny_keeps_the_structure_of_the_big_recipe(name: str) -> None:
    tiny, big = get(name), get(TINY[name])
    # a pattern with an entry for each layer becomes shorter with the model
    is_per_layer = big.model.layer_windows or len(big.model.attention_pattern) == big.model.num_layers
    for field in STRUCTURE:
        if field != "attention_pattern" or not is_per_layer:
            assert getattr(tiny.model, field) == getattr(big.model, field), field
    assert tiny.model.layer_types() == big.model.layer_types()[:tiny.model.num_layers]
    assert bool(tiny.model.sliding_window_tokens) == bool(big.model.sliding_window_tokens)
    assert set(tiny.model.layer_types()) == set(big.model.layer_types())
    assert (tiny.model.num_heads // tiny.model.num_kv_heads > 1) == (
        tiny.model.latent_attention is None), "grouped-query attention stays grouped"
    assert [(p.name, p.share) for p in tiny.data.phases] == [
        (p.name, p.tokens or p.share) for p in big.data.phases]
    assert not any(p.tokens or p.blend or p.global_batch_size for p in tiny.data.phases), "accepts any data"
    assert (tiny.optim.schedule, tiny.objective) == (big.optim.schedule, big.objective)
    for stage, big_stage in zip(tiny.extend.stages, big.extend.stages, strict=True):
        assert (stage.name, stage.kind) == (big_stage.name, big_stage.kind)
        assert [(p.name, p.share) for p in stage.parts] == [(p.name, p.share) for p in big_stage.parts]
    assert not any(s.blend or p.blend for s in tiny.extend.stages for p in s.parts), "accepts any data"


def test_k_exaone_as_published() -> None:
    """48 layers in the pattern LLLG: 36 sliding ones and 12 global ones without rotary embedding."""
    model = get("k-exaone-236b").model
    types = model.layer_types()
    assert (types.count("sliding_attention"), types.count("full_attention"), types[-1]) == (
        36, 12, "full_attention")
    assert (model.sliding_window_tokens, model.rope_on_global) == (128, False)
    assert (model.qk_norm, model.num_dense_layers) == (True, 1)
    assert (model.vocab_size, model.max_position_tokens, model.routed_scaling_factor) == (153600, 262144, 2.5)
    phases = get("k-exaone-236b").data.phases
    assert sum(p.tokens for p in phases) == 11e12 and {p.seq_len for p in phases} == {8192}
    # English is the rest of the web source
    assert {"web", "korean", "spanish", "german", "japanese", "vietnamese"} <= set(phases[0].blend)


def test_solar_open_as_published() -> None:
    """All layers are global with mixture of experts, pretrained at 4K with plain rotary embedding."""
    config = get("solar-open-102b")
    model = config.model
    assert set(model.layer_types()) == {"full_attention"}
    assert model.yarn is None
    assert ((model.vocab_size, model.num_dense_layers, model.qk_norm, model.num_mtp_layers)
            == (196608, 0, False, 0))
    assert [(p.tokens / 1e12, p.blend["korean"], p.blend["synthetic"]) for p in config.data.phases] \
        == [(10.8, 3.3, 10.2), (5.3, 3.2, 32.0), (2.7, 16.4, 36.1), (1.2, 13.6, 64.5)]
    assert all(sum(p.blend.values()) == pytest.approx(100) for p in config.data.phases)
    assert config.num_steps() == pytest.approx(20e12 / (13440 * 4096), abs=2)


def test_solar_opens_mid_training_as_published() -> None:
    """1.15 T tokens at 32K with 1,440 samples a step: 850 B of trajectories, 135 B of long documents, and
    170 B from phase 2.C."""
    config = get("solar-open-102b-mid")
    (phase,) = config.data.phases
    tokens = {name: weight / sum(phase.blend.values()) * phase.tokens / 1e9
              for name, weight in phase.blend.items()}
    assert tokens == pytest.approx({"reasoning-trajectories": 850, "long@8192": 135, "phase-2c": 170})
    assert (phase.seq_len, phase.global_batch_size) == (32768, 1440)
    assert config.num_steps() == round(1.155e12 / (1440 * 32768))
    assert config.model == get("solar-open-102b").model


@pytest.mark.parametrize(("name", "before", "published"), [
    ("solar-open-102b", 4096, [(32768, 1440), (102400, 480)]),
    ("k-exaone-236b", 8192, [(32768, 1024), (262144, 128)])])
def test_the_published_extension_ends_at_the_released_model(name: str, before: int,
                                                            published: list[tuple[int, int]]) -> None:
    """Lengths and (for Solar) batch sizes are as published; every stage has rehearsal data and a gate."""
    config = get(f"{name}-extend")
    assert [(s.seq_len, s.global_batch_size) for s in config.extend.stages] == published
    # `plan` shows the phases, which repeat the stages
    assert [(p.seq_len, p.global_batch_size) for p in config.data.phases] == published
    assert all({"long", "rehearsal"} == {part.name for part in s.parts} for s in config.extend.stages)
    assert config.extend.gate.every_steps > 0 and config.extend.gate.min_accuracy >= 0.98
    model = get(name).model
    for stage in config.extend.stages:
        model = extend_model(model, before, stage.seq_len, stage.rope_theta, stage.yarn_factor,
                             stage.yarn_original_tokens)
        assert (model.yarn is None) == (stage.seq_len < 65536 or name.startswith("k-exaone"))
        before = stage.seq_len
    assert model == config.model


def test_vibethinker_extension_starts_at_the_base_and_ends_at_the_recipe() -> None:
    config, base = get("vibethinker-1.5b"), get("qwen2-1.5b").model
    model, before = base, base.max_position_tokens
    lengths = [stage.seq_len for stage in config.extend.stages]
    assert [before, *lengths] == [4096, 16384, 32768, 40960]
    for stage in config.extend.stages:
        model = extend_model(model, before, stage.seq_len, stage.rope_theta, stage.yarn_factor)
        before = stage.seq_len
    assert model == config.model and model.yarn is None


def test_typhoon_s_fine_tuning_equals_the_authors_script() -> None:
    """Cosine from 2e-5 to 0, 5 % warm-up, 32 packed samples of 16,384 tokens, and defaults of transformers'
    `TrainingArguments`."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    trainer = Path(spec.origin).with_name("training_args.py").read_text()  # importing it takes seconds
    fields = re.findall(r"^    (\w+): float = field\(\s*default=([\d.e-]+)", trainer, re.MULTILINE)
    defaults = {name: float(text) for name, text in fields}
    config = get("typhoon-s-8b")
    optim, train = config.optim, config.train
    assert (optim.lr, optim.min_lr, optim.schedule, train.seed) == (2e-5, 0.0, "cosine", 42)
    assert (train.global_batch_size, config.data.phases[0].seq_len) == (32, 16384)
    assert (config.objective.name, optim.warmup_steps) == ("sft", round(0.05 * config.num_steps()))
    assert (optim.weight_decay, optim.clip_grad) == (defaults["weight_decay"], defaults["max_grad_norm"])
    assert (optim.beta1, optim.beta2, optim.eps) == tuple(
        defaults[f"adam_{name}"] for name in ("beta1", "beta2", "epsilon"))


def test_unknown_recipe_names_the_nearest_and_the_list() -> None:
    with pytest.raises(UserError, match=r"did you mean 'solar-open-102b' or") as e:
        get("solar-open-102")
    assert "`megatron-sov recipes` lists them" in str(e.value) and len(str(e.value)) < 200


# Every value of a recipe states its source, and sources that can be looked up are correct.


CONFIGS = json.loads((Path(__file__).parents[1] / "families/published_configs.json").read_text())
BIG = [name for name in names() if name not in TINY]


def list_unlabelled(name: str, table: Sources) -> list[str]:
    return [s.key for s in list_settings(get(name), table) if s.source == YOURS]


@pytest.mark.parametrize("name", names())
def test_every_value_that_a_recipe_sets_has_a_source(name: str) -> None:
    assert list_unlabelled(name, sources(name)) == []
    labelled = [s.source for s in list_settings(get(name), sources(name)) if s.source != DEFAULT]
    assert {source.kind for source in labelled} <= {"published", "config.json", "ours"}
    assert all(source.where for source in labelled)


def test_a_value_without_a_source_is_detected() -> None:
    without = ("optim.min_lr", "parallel.*")
    table = {key: source for key, source in sources("k-exaone-236b").items() if key not in without}
    assert list_unlabelled("k-exaone-236b", table) == [
        "parallel.ep", "parallel.zero1", "parallel.overlap_grad_reduce", "parallel.overlap_param_gather",
        "optim.min_lr"]
    assert len(list_unlabelled("tiny-qwen3", {})) > 20, "without a table all values count as the user's"


@cache
def find_used_entries(name: str) -> frozenset[str]:
    """Return the entries of a recipe's source table that match a setting."""
    return frozenset(select_used(get(name), sources(name)))


@pytest.mark.each("name", BIG)
def test_every_entry_of_a_source_table_is_used(name: str) -> None:
    """Except entries that a recipe inherits from its base recipe."""
    used = find_used_entries(name)
    inherited = {key for other in BIG if other != name for key in find_used_entries(other)}
    assert set(sources(name)) - used <= inherited
    extended = sources(name) | {"optim.lr": ours("last"), "optim.rl": ours("misspelt")}
    assert select_used(get(name), extended).keys() == used | {"optim.lr"}


RELEASED = [name for name in BIG if any(s.kind == "config.json" for s in sources(name).values())]


@pytest.mark.each("name", RELEASED)
def test_claimed_config_json_values_are_in_config_json(name: str) -> None:
    """The model's family reads the file, and knows which settings the file determines."""
    config = get(name)
    family = models.get_family(config.model.family)
    claimed = {s.key: s for s in list_settings(config, sources(name)) if s.source.kind == "config.json"}
    (released,) = {s.source.where.partition(",")[0] for s in claimed.values()}
    meaningful_nulls = {field for item in family.config for field in getattr(item, "null_tells", ())}
    raw = {field: value for field, value in extract_text_config(CONFIGS[released]).items()
           if value is not None or field in meaningful_nulls}
    determined = {"family", *COMMON_VALUES, *family.structure}
    for item in family.config:
        determined |= set(item.read(raw))
    read = {s.key: s.value for s in list_settings(replace(config, model=family.from_hf_config(raw)), {})}
    for key, setting in claimed.items():
        assert setting.value == read[key], key
        assert key.split(".")[1] in determined
    assert len(claimed) > 15


@pytest.mark.each("name", TINY)
def test_a_tiny_recipe_inherits_other_settings(name: str) -> None:
    big = {s.key: s for s in list_settings(get(TINY[name]), sources(TINY[name]))}
    tiny = list_settings(get(name), sources(name))
    assert all(s == big[s.key] for s in tiny if s.source != TINY_SOURCE)
    assert "model.hidden_size" in {s.key for s in tiny if s.source == TINY_SOURCE}
    assert not any(s == big.get(s.key) for s in tiny if s.source == TINY_SOURCE)


def test_sources_are_matched_by_setting_names() -> None:
    """Nested, in lists and in tables; the last match wins; a group that is None by default is set as a
    whole."""
    config = get("solar-open-102b")
    config = replace(config, model=replace(config.model, yarn=YarnConfig()), optim=OptimConfig(lr=1.0),
                     data=replace(config.data, phases=(PhaseConfig("a", blend={"b/64": 2.0}),)))
    table = {"data.*": ours("all"), "data.phases.*.seq_len": published("one")}
    settings = {s.key: (s.value, s.source) for s in list_settings(config, table)}
    assert settings["data.phases.0.blend.b/64"] == (2.0, ours("all"))
    assert settings["data.phases.0.seq_len"] == (4096, published("one"))
    # counts as set although it equals the class's default, because the recipe has no YaRN
    assert settings["model.yarn.factor"] == (2.0, YOURS)
    assert (settings["optim.lr"], settings["optim.min_lr"]) == ((1.0, YOURS), (3e-6, DEFAULT))
    assert "recipe" not in settings
    changes = [f"{key}={json.dumps(value)}" for key, (value, _) in settings.items()]
    assert apply_settings(config, changes) == config


def test_derived_sources_replace_changed_settings() -> None:
    changed = derive_sources({"optim.lr": ours("a"), "optim.*": ours("b")}, {"optim.lr": ours("c")})
    assert changed == {"optim.*": ours("b"), "optim.lr": ours("c")} and list(changed)[-1] == "optim.lr"
    before = get("tiny-qwen3")
    after = apply_settings(before, ["optim.lr=1", 'data.phases.0.blend={"a": 1}'])
    assert label_changes(before, after, YOURS) == {"optim.lr": YOURS, "optim.min_lr": YOURS,
                                                   "data.phases.0.blend.a": YOURS}


K_EXAONE_2_TENSORS, K_EXAONE_2_BYTES = 59_396, 1_498_715_008_512
"""Size of the released folder (Megatron-Bridge, examples/model_verification_cards/k-exaone-2/card.yaml)."""


def test_k_exaone_2_has_the_released_tensors_and_bytes() -> None:
    model = recipes.get("k-exaone2-750b").model

    # bf16, except the routers' float32 biases
    num_bytes = sum(w.numel * len(w.layers) * (4 if w.is_buffer else 2) for w in layer_weights(model))
    tensors = {name for link in models.get_family(model.family).links(model) for name in link.hf_names}

    assert (num_bytes, len(tensors)) == (K_EXAONE_2_BYTES, K_EXAONE_2_TENSORS)
    result = count_params(model)
    assert result.total + result.mtp == pytest.approx(749.4e9, rel=1e-3)
    assert result.active == pytest.approx(37e9, rel=0.01)


def test_windows_and_limits_of_k_exaone_2_equal_those_of_inference_engines() -> None:
    model = recipes.get("k-exaone2-750b").model

    windows, limits = model.windows(), model.limits()

    # NVIDIA's Dynamo recipe: 20 full-attention and 58 sliding layers; TensorRT-LLM's pull request 17067
    assert (windows.count(0), windows.count(128), windows[1]) == (20, 57, 4096)
    assert [i for i, limit in enumerate(limits) if limit] == list(range(62, 78)) and {*limits} == {0.0, 7.0}
    assert (model.mtp_window(), model.num_predictions, model.num_dense_layers) == (128, 4, 2)


def test_layouts_of_k_exaone_2_are_valid() -> None:
    assert recipes.get("k-exaone2-750b").problems(512) == []
    assert recipes.get("k-exaone2-750b-extend").problems(1024) == []


@pytest.mark.each("layers", [2, 6, 80])
def test_another_depth_keeps_per_layer_settings(layers: int) -> None:
    model = recipes.get("k-exaone2-750b").model
    resized = replace(model, **model.fields_for_depth(layers))

    assert resized.problems() == [] and resized.windows()[:2] == [0, 4096][:layers]
    assert resized.limits()[-1] == 7.0 and (layers < 6 or resized.limits()[0] == 0)
