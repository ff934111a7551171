"""Every value that a recipe sets says where it comes from, truly as far as it can be looked up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sov import models
from megatron_sov.config import OptimConfig, PhaseConfig, YarnConfig, apply_settings
from megatron_sov.models.family import PLAIN
from megatron_sov.models.text_inside import text_config
from megatron_sov.recipes import RECIPES, TINY, get, names, sources
from megatron_sov.recipes.sources import (
    DEFAULT,
    YOURS,
    Sources,
    derive,
    in_effect,
    ours,
    published,
    relabelled,
    settings,
)
from megatron_sov.recipes.tiny import SHRUNK

CONFIGS = json.loads((Path(__file__).parents[1] / "models/published_configs.json").read_text())
BIG = [name for name in names() if name not in TINY]


def unlabelled(name: str, table: Sources) -> list[str]:
    return [s.key for s in settings(get(name), table) if s.source == YOURS]


@pytest.mark.parametrize("name", names())
def test_every_value_that_a_recipe_sets_has_a_source(name: str) -> None:
    assert unlabelled(name, sources(name)) == []
    labelled = [s.source for s in settings(get(name), sources(name)) if s.source != DEFAULT]
    assert {source.kind for source in labelled} <= {"published", "config.json", "ours"}
    assert all(source.where for source in labelled)


def test_a_value_without_a_source_is_noticed() -> None:
    without = ("optim.min_lr", "parallel.*")
    table = {key: source for key, source in sources("k-exaone-236b").items() if key not in without}
    assert unlabelled("k-exaone-236b", table) == [
        "parallel.ep", "parallel.zero1", "parallel.overlap_grad_reduce", "parallel.overlap_param_gather",
        "optim.min_lr"]
    assert len(unlabelled("tiny-qwen3", {})) > 20, "without a table a recipe's values are its author's"


@pytest.mark.parametrize("name", BIG)
def test_no_entry_of_a_table_is_idle(name: str) -> None:
    """But those that a recipe took over from the one that it goes back to."""
    used = in_effect(get(name), sources(name))
    others = {key for other in BIG if other != name for key in in_effect(get(other), sources(other))}
    assert set(sources(name)) - set(used) <= others
    more = sources(name) | {"optim.lr": ours("last"), "optim.rl": ours("misspelt")}
    assert in_effect(get(name), more).keys() == used.keys() | {"optim.lr"}


RELEASED = [name for name in BIG if any(s.kind == "config.json" for s in sources(name).values())]


@pytest.mark.parametrize("name", RELEASED)
def test_what_is_said_to_stand_in_a_config_json_stands_there(name: str) -> None:
    """Read by the model's family, which says which settings the file or its class decides."""
    config = get(name)
    family = models.get(config.model.family)
    said = [s for s in settings(config, sources(name)) if s.source.kind == "config.json"]
    (released,) = {s.source.where.partition(",")[0] for s in said}
    told = {field for item in family.config for field in getattr(item, "null_tells", ())}
    raw = {field: value for field, value in text_config(CONFIGS[released]).items()
           if value is not None or field in told}
    decided = {"family", *PLAIN, *family.structure,
               *(field for item in family.config for field in item.read(raw))}
    read = {s.key: s.value for s in settings(replace(config, model=family.from_hf_config(raw)), {})}
    assert {s.key: s.value for s in said} == {s.key: read[s.key] for s in said}
    assert {s.key.split(".")[1] for s in said} <= decided
    assert len(said) > 15


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_recipe_inherits_what_it_did_not_shrink(name: str) -> None:
    big = {s.key: s for s in settings(get(TINY[name]), sources(TINY[name]))}
    tiny = settings(get(name), sources(name))
    assert all(s == big[s.key] for s in tiny if s.source != SHRUNK)
    assert "model.hidden_size" in {s.key for s in tiny if s.source == SHRUNK}
    assert not any(s == big.get(s.key) for s in tiny if s.source == SHRUNK)


def test_values_that_nobody_published_do_not_claim_to_be() -> None:
    kinds = {s.key: s.source.kind for s in settings(get("k-exaone-236b"), sources("k-exaone-236b"))}
    assert {kinds[f"optim.{field}"] for field in ("name", "lr", "schedule")} == {"published"}
    chosen = ("optim.min_lr", "optim.warmup_steps", "optim.decay_share", "optim.weight_decay",
              "train.global_batch_size", "parallel.ep", "data.phases.0.blend.web")
    assert {kinds[key] for key in chosen} == {"ours"}


def test_values_are_named_as_settings_are() -> None:
    """Nested, in lists and in tables; the last match holds; what is None by default is set as a whole."""
    config = get("solar-open-102b")
    config = replace(config, model=replace(config.model, yarn=YarnConfig()), optim=OptimConfig(lr=1.0),
                     data=replace(config.data, phases=(PhaseConfig("a", blend={"b/64": 2.0}),)))
    table = {"data.*": ours("all"), "data.phases.*.seq_len": published("one")}
    found = {s.key: (s.value, s.source) for s in settings(config, table)}
    assert found["data.phases.0.blend.b/64"] == (2.0, ours("all"))
    assert found["data.phases.0.seq_len"] == (4096, published("one"))
    assert found["model.yarn.factor"] == (2.0, YOURS), "the class's own default, and yet set"
    assert (found["optim.lr"], found["optim.min_lr"]) == ((1.0, YOURS), (3e-6, DEFAULT))
    assert "recipe" not in found
    changes = [f"{key}={json.dumps(value)}" for key, (value, _) in found.items()]
    assert apply_settings(config, changes) == config


def test_a_derived_table_changes_what_it_says() -> None:
    changed = derive({"optim.lr": ours("a"), "optim.*": ours("b")}, {"optim.lr": ours("c")})
    assert changed == {"optim.*": ours("b"), "optim.lr": ours("c")} and list(changed)[-1] == "optim.lr"
    before = get("tiny-qwen3")
    after = apply_settings(before, ["optim.lr=1", 'data.phases.0.blend={"a": 1}'])
    assert relabelled(before, after, YOURS) == {"optim.lr": YOURS, "data.phases.0.blend.a": YOURS}


def test_a_recipe_is_an_entry_of_a_table() -> None:
    assert all(recipe.build().recipe == name for name, recipe in RECIPES.items())
