"""Settings survive JSON; `--set` reads types and suggests similar keys; `--data` reads folders and
weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.base.hints.removed import RENAMED
from megatron_sov.base.hints.table import find_note
from megatron_sov.base.settings import SettingsError
from megatron_sov.model.config import (
    DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, ParallelConfig, PhaseConfig, PolicyConfig,
    RunConfig, TrainConfig, apply_settings, from_dict, parse_data_paths)
from megatron_sov.model.config.post_training import METHODS
from tests.te_double.library_shapes import CONTRACT

Small = Callable[..., RunConfig]
"""Fixture `small`: builds a small run's config."""


def draw_fields(cls: type, *names: str, **strategies: Any) -> st.SearchStrategy[Any]:
    """Draw an instance: fields in `names` by their types and bounds, others by their strategies."""
    return st.builds(cls, **dict.fromkeys(names, ...), **strategies)  # ...: infer from the type


blend = st.dictionaries(st.text(max_size=8), st.floats(0, 9), max_size=3)
phase = draw_fields(PhaseConfig, "tokens", "share", "seq_len", "global_batch_size", "min_lr", blend=blend)
run_configs = draw_fields(
    RunConfig, "recipe",
    model=draw_fields(ModelConfig, "family", "vocab_size", "hidden_size", "num_layers", "num_heads",
                      "num_kv_heads", "rope_theta", "rope_share", "yarn", "num_mtp_layers",
                      head_dim=st.sampled_from([2, 16])),
    parallel=draw_fields(ParallelConfig, "tp", "sp", "ep", "pipeline_layout"),
    data=draw_fields(DataConfig, "packing", "skip_steps", "max_epochs",
                     phases=st.lists(phase, min_size=1, max_size=3).map(tuple)),
    optim=draw_fields(OptimConfig, "lr", "schedule", "beta1", "rewarm", "muon_ns_coefficients"),
    train=draw_fields(TrainConfig, "steps", "tokens", "precision", "recompute", "hidden_dropout"),
    objective=draw_fields(ObjectiveConfig, "name", "text_coeff"))


@pytest.mark.deep
@given(run_configs)
def test_a_config_reads_back_equal_from_its_json(config: RunConfig) -> None:
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.each(("setting", "path", "value"), [
    ("optim.lr=1e-4", ("optim", "lr"), 1e-4),
    ("optim.lr=1", ("optim", "lr"), 1.0),
    ("parallel.sp=true", ("parallel", "sp"), True),
    ("model.yarn=null", ("model", "yarn"), None),
    ("model.yarn.factor=8", ("model", "yarn", "factor"), 8.0),
    ("data.phases.0.seq_len=512", ("data", "phases", 0, "seq_len"), 512),
    ('data.phases.0.blend={"en": 2, "ko": 1}', ("data", "phases", 0, "blend"), {"en": 2.0, "ko": 1.0}),
    ("data.phases.0.blend.ko=3", ("data", "phases", 0, "blend", "ko"), 3.0),
    ("needle.depths=[0, 0.5]", ("needle", "depths"), (0.0, 0.5)),
    ("obs.wandb_project=my run = 2", ("obs", "wandb_project"), "my run = 2"),
])
def test_set_converts_to_the_type_of_the_field(setting: str, path: tuple[str | int, ...], value: object,
                                               small: Small) -> None:
    node: Any = apply_settings(small(), [setting])
    for key in path:
        node = node[key] if isinstance(node, (dict, tuple)) else getattr(node, str(key))
    assert (node, type(node)) == (value, type(value))


def test_later_settings_win_without_changing_the_given_config(small: Small) -> None:
    config = small()
    assert apply_settings(config, ["train.steps=1", "train.steps=2"]).train.steps == 2
    assert config.train.steps == 10


def test_all_problems_of_a_file_are_named_in_field_order(small: Small) -> None:
    raw = small().to_dict()
    raw["train"] |= {"stepz": 3, "micro_batch_size": "two"}
    raw["model"] |= {"num_expert": 4}
    with pytest.raises(SettingsError, match=r"config\.json: 3 problems") as e:
        from_dict(raw, "config.json")
    assert e.value.codes == [("unknown", "model.num_expert"), ("type", "train.micro_batch_size"),
                             ("unknown", "train.stepz")]


@pytest.mark.each(("old", "now"), RENAMED.items())
def test_a_renamed_setting_is_refused_with_its_new_name(old: str, now: str, small: Small) -> None:
    with pytest.raises(SettingsError, match=f"{old}: no such setting; it is now called {now}$"):
        apply_settings(small(), [f"{old}=1"])


def test_a_run_of_an_earlier_version_opens_with_its_values(small: Small) -> None:
    raw = small().to_dict()
    evaluation, guards = raw["evaluate"], raw["guards"]
    # write the settings under their earlier names
    evaluation["beside"] = evaluation.pop("background") | {"judges": ["ppl"], "max_waiting": 3}
    del evaluation["beside"]["tasks"], guards["on_sdc"]
    guards["on_corruption"] = "record"
    config = from_dict(raw)
    assert (config.evaluate.background.tasks, config.evaluate.background.max_waiting) == (("ppl",), 3)
    assert config.guards.on_sdc == "record"
    assert "on_corruption" in guards, "the caller's settings stay as they are"
    with pytest.raises(SettingsError, match="it is now called guards"):
        from_dict(raw | {"guards": {"on_corruption": "record", "on_sdc": "exit"}})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    (tmp_path / "b:2").mkdir()
    return tmp_path


def test_weight_follows_the_last_colon(data: Path) -> None:
    assert parse_data_paths([f"{data}/a:0.5", f"{data}/b:2"]) == {f"{data}/a": 0.5, f"{data}/b:2": 1.0}
    assert parse_data_paths([f"{data}/b:2:3"]) == {f"{data}/b:2": 3.0}


@pytest.mark.parametrize(("arguments", "message"), [
    (["none"], r"--data none: does not exist; check its path"),
    ([""], r"--data '': names no folder"), ([":2"], r"--data ':2': names no folder"),
    (["a:x"], r"--data a:x: does not exist, and 'x' after the colon is not a weight"),
    (["a:-1"], "must be a number that is not negative"),
    (["a:nan"], "must be a number that is not negative"),
    (["a", "a:2"], "--data a: is given twice"),
    (["file"], "--data file: is a file, .* `sov-data pack --tokenizer DIR --input file --output FOLDER`"),
])
def test_bad_data_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
                             message: str) -> None:
    (data / "file").write_text("")
    monkeypatch.chdir(data)
    with pytest.raises(UserError, match=message):
        parse_data_paths(arguments)


def test_unoffered_library_fields_have_a_reason(small: Small) -> None:
    with pytest.raises(UserError, match=r"gpu\.cuda_graph_impl: no such setting"):
        apply_settings(small(), ["gpu.cuda_graph_impl=local"])
    with pytest.raises(UserError, match=r"_for_mxfp8_param_ag: no such setting; .*train\.fp8_weights"):
        from_dict({**small().to_dict(), "train": {"reuse_grad_buf_for_mxfp8_param_ag": 1}})
    contract = json.loads(CONTRACT.read_text())["megatron.core"]
    megatron_fields = {name for fields in contract["fields"].values() for name in fields}
    not_offered = (
        "num_distributed_optimizer_instances", "overlap_param_gather_with_optimizer_step",
        "fp8_dot_product_attention", "cross_entropy_loss_fusion", "cross_entropy_fusion_impl",
        "cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph")
    assert set(not_offered) <= megatron_fields and all(map(find_note, not_offered))
    page = (Path(__file__).parents[3] / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert [name for name in not_offered if f"`{name}`" not in page] == []


def change_recipe(recipe: str, *settings: str) -> RunConfig:
    """Return a recipe's config with settings as given to `--set`."""
    return apply_settings(recipes.get(recipe), list(settings))


def test_policy_numbers_follow_the_method_unless_they_are_set_too() -> None:
    recipe = change_recipe("tiny-solar-open-rl")
    assert (recipe.policy.parts.clip_low, recipe.policy.parts.kl) == (3e-4, "none")
    for method, method_parts in METHODS.items():
        policy = change_recipe("tiny-solar-open-rl", f"policy.method={method}").policy
        # The recipe is set for GSPO, so its own numbers stay with this method only.
        fields: Any = {"method": method}
        expected = recipe.policy if method_parts is METHODS["gspo"] else PolicyConfig(**fields)
        assert policy.parts == expected.parts, method
    settings = ["policy.method=grpo", "policy.clip_low=0.1"]
    for ordered_settings in (settings, settings[::-1]):
        parts = change_recipe("tiny-solar-open-rl", *ordered_settings).policy.parts
        assert (parts.clip_low, parts.clip_high, parts.kl, parts.kl_coeff) == (0.1, 0.2, "k3", 0.0)
    parts = change_recipe("tiny-typhoon-s-legal", "policy.method=dapo").policy.parts
    assert (parts.clip_high, parts.knowledge_coeff, parts.knowledge_batch_size) == (0.28, 0, 0)


def test_preference_beta_follows_the_method_unless_it_is_set_too() -> None:
    preference = change_recipe("solar-open-102b-dpo", "preference.method=simpo").preference
    assert (preference.effective_beta, preference.beta) == (2.0, None)
    preference = change_recipe("solar-open-102b-dpo", "preference.method=ipo",
                               "preference.beta=0.3").preference
    assert preference.effective_beta == 0.3


@pytest.mark.each(("recipe", "changes", "expected"), [
    ("tiny-solar-open", {"lr": 1e-5}, 1e-5 * 2e-4 / 4e-3),  # below the recipe's own least rate
    ("tiny-solar-open", {"lr": 1e-5, "min_lr": 1e-6}, 1e-6), ("tiny-solar-open", {"min_lr": 1e-6}, 1e-6),
    ("solar-open-102b-rl", {"lr": 1e-3}, 1e-3),  # a constant rate stays one
    ("solar-open-102b-rl", {"lr": 1e-3, "schedule": "cosine"}, 1e-3 * 3e-6 / 2.5e-4),
    ("solar-open-102b", {"schedule": "wsd"}, 3e-6), ("solar-open-102b-dpo", {"lr": 1e-9}, 0)])
def test_min_lr_follows_the_peak_at_the_recipes_ratio(recipe: str, changes: dict[str, Any],
                                                      expected: float) -> None:
    optim = change_recipe(recipe, *(f"optim.{name}={value}" for name, value in changes.items())).optim
    assert optim.min_lr == pytest.approx(expected, rel=1e-12) and not optim.problems()


def test_an_unchanged_peak_leaves_min_lr_bit_equal() -> None:
    # deriving min_lr again would change it: 3e-5 / 3e-4 * 3e-4 != 3e-5 in floating point
    recipe = recipes.get("k-exaone-236b")
    assert apply_settings(recipe, [f"optim.lr={recipe.optim.lr}"]).optim == recipe.optim


def test_a_refused_or_absent_peak_does_not_derive_min_lr() -> None:
    with pytest.raises(SettingsError, match=r"optim\.lr = 1.* must"):
        apply_settings(recipes.get("tiny-solar-open"), [f"optim.lr=1{'0' * 400}"])
    assert apply_settings(recipes.get("tiny-solar-open"), ["optim={}"]).optim == OptimConfig()
