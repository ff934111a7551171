"""Benchmark drivers: recipes of learning runs, means over seeds, and fitted parameters."""

import math
import sys
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sov import recipes
from megatron_sov.plan.speed.parameters import Parameters, load_default_parameters
from megatron_sov.plan.speed.step import estimate_step
from megatron_sov.plan.speed.workload import Workload, build_shape
from megatron_sov.work.clusters.chips import CHIPS, default_links

sys.path += [str(Path(__file__).parents[2] / folder) for folder in ("benchmarks", "benchmarks/real")]
from learning import (
    PLACEHOLDER, Recipe, check_start, compute_interval, decide, find_recipes, read_figure, run_claim,
    run_commands)
from plan_fit import PRIORS, Prior, Sample, error, fit
from seeds import compute_half_width, format_over_seeds
from word_task import ListedWord

TOY = """
setup:
  tools: ["python -c pass"]
claims:
  sums:
    says: Two is more than one.
    seeds: 3
    budget_s: 0.000001
    start: {arm: one, measure: value, floor: 0.5, ceiling: 1.5}
    arms:
      one: ["python -c print([1.0]) > {here}/figure.json"]
      two: ["python -c print([2.0]) {tools} > {here}/figure.json"]
    measures:
      value: {file: figure.json, value: "0", unit: a number}
    tests:
      - {measure: value, lower: one, higher: two}
"""


@pytest.fixture
def toy(tmp_path: Path) -> Recipe:
    file = tmp_path / "toy.yaml"
    file.write_text(TOY)
    return Recipe(file)


@pytest.mark.each("file", find_recipes())
def test_every_command_names_existing_placeholders(file: Path) -> None:
    recipe = Recipe(file)
    known_placeholders = {"here", file.parent.name, "seed", "base", *recipe.setup}
    for command in recipe.commands():
        assert set(PLACEHOLDER.findall(command)) <= known_placeholders, command
        scripts = f"{{{file.parent.name}}}/"
        for script in (word for word in command.split() if scripts in word):
            assert (file.parent / script.partition(scripts)[2].partition(":")[0]).is_file(), script
    for name, claim in recipe.claims.items():
        recipe.check_registration(name)
        setups = recipe.list_setups(name)
        used = {placeholder for arm in claim["arms"].values() for command in arm
                for placeholder in PLACEHOLDER.findall(recipe.fill_words(command))
                if placeholder in recipe.setup}
        assert used <= set(setups)
        for test in claim["tests"]:
            assert {test["lower"], test["higher"]} <= set(claim["arms"])
            assert test["measure"] in claim["measures"]
        for curve in claim.get("curves", {}).values():
            assert set(curve.get("not", [])) <= set(claim["arms"])


@pytest.mark.each(("text", "measure", "expected"), [
    ('{"a": {"b": 2}}', {"file": "x.json", "value": "a/b"}, 2.0),
    ('{"a": [1, 3]}', {"file": "x.json", "value": "a/1"}, 3.0),
    ('{"a": {"x": {"v": 1}, "y": {"v": 3}}}', {"file": "x.json", "value": "a/*/v"}, 2.0),
    ('{"r": 1}\n{"r": 0}\n', {"file": "x.jsonl", "value": "r"}, 0.5),
    ('{"event": "a", "v": 1}\n{"event": "a", "v": 5}\n{"event": "b", "v": 9}\n',
     {"file": "x.jsonl", "value": "v", "event": "a"}, 5.0)])
def test_a_figure_is_read_by_its_path_of_keys(text: str, measure: dict[str, str], expected: float,
                                              tmp_path: Path) -> None:
    (tmp_path / measure["file"]).write_text(text)
    assert read_figure(tmp_path, measure) == expected


@pytest.mark.each(("differences", "bound", "seeds", "expected"), [
    ([1.0, 1.1, 0.9], 0.0, 3, "holds"), ([1.0, 1.1, 0.9], 2.0, 3, "does not hold"),
    ([1.0, -1.0, 0.1], 0.0, 3, "undecided"), ([1.0, 1.1], 0.0, 3, "undecided"), ([1.0], 0.0, 1, "undecided"),
    ([1.0, 1.0, 1.0], 0.0, 3, "undecided"), ([-1.0, -1.1, -0.9], 0.0, 3, "does not hold"),
    ([-0.01, -0.02, -0.015], -0.1, 3, "holds")])
def test_a_verdict_follows_from_the_interval(differences: list[float], bound: float, seeds: int,
                                             expected: str) -> None:
    assert decide(differences, bound, seeds) == expected


def test_an_edited_claim_differs_from_its_registration(toy: Recipe) -> None:
    toy.claims["sums"]["registered"] = toy.compute_digest("sums")
    toy.check_registration("sums")
    toy.setup["tools"] = ["python -c 'another setup'"]
    with pytest.raises(SystemExit, match="undo the edit"):
        toy.check_registration("sums")


def test_a_spent_budget_starts_no_other_seed(toy: Recipe, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    run_claim(toy, "sums", tmp_path / "work", None)
    printed = capsys.readouterr().out
    assert "toy/sums: 1 of 3 seeds, registered as nothing" in printed
    assert "one < two in value, bound 0: undecided, +1.0000" in printed


@pytest.mark.each(("figure", "is_refused"), [("0.4", True), ("1.0", False), ("1.6", True)])
def test_a_start_outside_of_its_range_stops_the_claim(figure: str, is_refused: bool, toy: Recipe,
                                                      tmp_path: Path) -> None:
    (tmp_path / "figure.json").write_text(f"[{figure}]")
    with pytest.raises(SystemExit) if is_refused else nullcontext():
        check_start(toy.claims["sums"], tmp_path)


def test_a_program_of_a_setup_runs_and_its_seconds_are_counted(tmp_path: Path) -> None:
    run_commands(tmp_path, ["{tools}/sh -c 'echo 3' > {here}/three"], {"tools": "/bin"})
    assert (tmp_path / "three").read_text() == "3\n"
    assert float((tmp_path / "seconds").read_text()) >= 0


@pytest.mark.each(("response", "reward"), [(" Apple.\n", 1), ('"river"', 1), ("stone", 0),
                                           ("apple river", 0)])
def test_a_response_is_one_listed_word(response: str, reward: float) -> None:
    assert ListedWord().score({"prompt": "", "response": response, "answer": "apple river"}) == reward


def test_the_interval_is_students() -> None:
    low, high = compute_interval([1.0, 2.0, 3.0]) or (0, 0)
    assert (low, high) == (pytest.approx(2 - 2.4841, abs=1e-3), pytest.approx(2 + 2.4841, abs=1e-3))


def test_three_seeds_give_an_interval_and_one_seed_none() -> None:
    assert compute_half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3 ** 0.5, rel=1e-6)
    assert format_over_seeds([1.0, 2.0, 3.0], "+.2f") == "+2.00 ± 2.48"
    assert format_over_seeds([0.25], ".1%") == "25.0%"


def test_fitted_parameters_stay_within_their_bounds() -> None:
    for path, prior in PRIORS.items():
        value: object = vars(load_default_parameters())
        for name in path.split("."):
            assert isinstance(value, dict)
            value = value[name]
        assert isinstance(value, float)
        assert prior.low <= value <= prior.high * 1.0001, path
        assert prior.low <= prior.value <= prior.high, path


def test_fit_recovers_planted_parameters() -> None:
    hidden = deepcopy(vars(load_default_parameters()))
    hidden["product_fraction"]["ampere"]["bf16"], hidden["hbm_fraction"] = 0.65, 0.6
    truth = Parameters(**hidden)
    a100 = CHIPS["a100"]
    samples = []
    for name in ("llama-3.1-8b", "exaone-4.0-1.2b", "qwen2-1.5b", "qwen3-4b", "qwen3-8b", "gemma-3-1b"):
        for seq_len in (512, 2048):
            w = Workload(build_shape(recipes.get(name).model), a100, default_links(a100), 8, seq_len, 4, 256,
                         sharding="zero1")
            samples.append(Sample(w, estimate_step(w, truth).tokens_per_s_per_gpu))
    samples[3] = replace(samples[3], tokens_per_s_per_gpu=samples[3].tokens_per_s_per_gpu * 3)
    priors = {"product_fraction.ampere.bf16": Prior(0.8, 3.0, 0.4, 1.0),
              "hbm_fraction": Prior(0.8, 3.0, 0.3, 1.0)}
    result = fit(samples, priors, load_default_parameters())
    assert math.isclose(result.product_fraction["ampere"]["bf16"], 0.65, rel_tol=0.03)
    assert math.isclose(result.hbm_fraction, 0.6, rel_tol=0.06)
    assert all(abs(error(s, result)) < 0.02 for i, s in enumerate(samples) if i != 3)
