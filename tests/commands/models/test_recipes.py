"""`megatron-sov recipes`: the list, one recipe with its sources, and JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.base.artifacts import format_json
from megatron_sov.model import objectives
from megatron_sov.model.config import apply_settings, from_dict
from megatron_sov.model.families import supported as models


def test_lists_every_recipe_under_its_job_by_size(read_output: Any) -> None:
    listed = []
    for words in ([], ["--tiny"]):
        lines = read_output("recipes", *words).splitlines()
        listed += [line.split()[0] for line in lines if " parameters (" in line]
        assert [line for line in lines if line.endswith(":") and "packages" not in line] == [
            "pretrain:", "extend the context:", "fine-tune:", "distill:", "learn from preferences:",
            "reinforcement learning:"]
        assert {line.split()[0].startswith("tiny-") for line in lines
                if " parameters (" in line} == {bool(words)}
        assert f"model families: {', '.join(models.FAMILIES)}" in lines
        for name in objectives.BUILT_IN:
            assert any(f"{name} (megatron-sov " in line for line in lines), name
    assert sorted(listed) == sorted(recipes.names())
    lines = [line.strip() for line in read_output("recipes").splitlines()]
    sizes = [float(line.split()[1]) * {"M": 1e-3, "B": 1, "T": 1e3}[line.split()[2]]
             for line in lines[1:lines.index("extend the context:") - 1]]
    assert sizes == sorted(sizes)
    solar = next(line for line in lines if line.startswith("solar-open-102b"))
    assert "102.7 B parameters (12.1 B active)" in solar  # as published, arXiv 2601.07022
    assert "20 T tokens" in solar
    for recipe, attention in (("solar-open-102b", "experts, global"), ("k-exaone-236b", "sliding + global"),
                              ("solar-open2-250b", "linear + global")):
        assert f"{attention} attention," in next(line for line in lines if line.startswith(recipe))


def test_prints_where_each_value_comes_from(read_output: Any) -> None:
    output = read_output("recipes", "k-exaone-236b", "--set", "train.steps=7", "--set", "optim.lr=1e-3")
    lines = {line.split()[0]: line.split(maxsplit=3)[1:] for line in output.splitlines()}
    assert lines["model.num_layers"] == ["48", "config.json", "LGAI-EXAONE/K-EXAONE-236B-A23B"]
    assert lines["optim.name"] == ['"muon"', "published", "arXiv 2601.01739, pre-training setup"]
    assert lines["optim.weight_decay"] == ["0.1", "ours", "not published"]
    assert lines["train.seed"] == ["1234", "default"]
    assert lines["train.steps"] == ["7", "yours", "--config or --set"]
    assert lines["optim.lr"] == ["0.001", "yours", "--config or --set"]


def test_values_from_a_file_and_from_the_recipe_are_distinguished(tmp_path: Path, read_output: Any) -> None:
    file, printed = tmp_path / "mine.yaml", tmp_path / "whole.json"
    file.write_text("recipe: k-exaone-236b\noptim: {weight_decay: 0.25}\nmodel: {num_layers: 24}\n")
    config = apply_settings(recipes.get("k-exaone-236b"), ["optim.weight_decay=0.25", "model.num_layers=24"])
    printed.write_text(format_json(config))
    pages = []
    for words in (["k-exaone-236b", "--config", str(file)], ["--config", str(file)],
                  ["--config", str(printed)]):
        pages.append(read_output("recipes", *words, "--set", "optim.lr=1e-3"))
    assert pages[0] == pages[1] == pages[2]
    lines = {line.split()[0]: line.split(maxsplit=3)[1:] for line in pages[0].splitlines()}
    for key, value in {"optim.weight_decay": "0.25", "model.num_layers": "24", "optim.lr": "0.001"}.items():
        assert lines[key] == [value, "yours", "--config or --set"]
    assert lines["optim.name"] == ['"muon"', "published", "arXiv 2601.01739, pre-training setup"]
    printed.write_text(format_json(config).replace('"k-exaone-236b"', '"gone"'))
    assert "published" not in read_output("recipes", "--config", str(printed))


def test_prints_a_recipe_that_reads_back(read_output: Any) -> None:
    changes = ["--set", "train.steps=7", "--set", "parallel.ep=2"]
    config = from_dict(json.loads(read_output("recipes", "tiny-k-exaone", "--json", *changes)))
    assert (config.train.steps, config.parallel.ep) == (7, 2)
    assert config.model == recipes.get("tiny-k-exaone").model


@pytest.mark.each(("arguments", "message"), [
    (["tiny-solar-opne"], "did you mean 'tiny-solar-open'?"),
    (["tiny-solar-open", "--set", "train.stpes=7"], "did you mean 'train.steps'?"),
    (["--set", "train.steps=7"], "needs a recipe"),
    (["--json"], "needs a recipe"),
])
def test_mistakes_end_with_one_sentence(arguments: list[str], message: str, get_refusal: Any) -> None:
    assert message in get_refusal("recipes", *arguments)
