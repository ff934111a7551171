"""The faults that benchmarks plant name functions, texts, layouts and folders that are there."""

import ast
import importlib.util
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sov.work.processes.children import remove_unsafe_variables

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import planted_faults

ROOT = Path(__file__).parents[2]
LAYOUT_FAULTS = yaml.safe_load((ROOT / "benchmarks/data/layout_faults.yaml").read_text(encoding="utf-8"))
AREAS = yaml.safe_load((ROOT / "benchmarks/data/planted_faults.yaml").read_text(encoding="utf-8"))


def read_function(place: str) -> str:
    """Return the source of MODULE:NAME.NAME without importing the module; "" if it does not exist."""
    module, _, name = place.partition(":")
    package = importlib.util.find_spec(module.partition(".")[0])
    roots = [Path(folder).parent for folder in package.submodule_search_locations]
    (file,) = [path for root in roots if (path := root / f"{module.replace('.', '/')}.py").is_file()]
    source = file.read_text(encoding="utf-8")
    node: Any = ast.parse(source)
    for part in name.split("."):
        inner_nodes = getattr(node, "body", ())
        node = next((inner for inner in inner_nodes if getattr(inner, "name", "") == part), None)
    if node is None:
        return ""
    return textwrap.dedent("\n".join(source.split("\n")[node.lineno - 1:node.end_lineno]))


@pytest.mark.each("fault", LAYOUT_FAULTS["source"])
def test_each_fault_of_a_layout_can_be_planted(fault: dict[str, Any]) -> None:
    assert fault["right"] in read_function(fault["function"])
    assert fault["function"].partition(":")[2] in LAYOUT_FAULTS["places"]
    assert set(fault["layouts"]) <= set(LAYOUT_FAULTS["layouts"])


def test_no_place_is_left_of_a_fault_that_is_gone() -> None:
    assert set(LAYOUT_FAULTS["places"]) == {fault["function"].partition(":")[2]
                                            for fault in LAYOUT_FAULTS["source"]}
    assert set(LAYOUT_FAULTS["losses"]) <= set(LAYOUT_FAULTS["layouts"])


@pytest.mark.each("folders", [area[key] for area in AREAS.values() for key in ("source", "tests")])
def test_each_area_of_planted_faults_has_its_folders(folders: str) -> None:
    assert all((ROOT / folder).is_dir() for folder in folders.split())


def test_planted_faults_act_in_workers_of_rewards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variables = {"PYTHON_PLANTED_FAULT": "3", "PYTHON_PLANTED_REACHED": str(tmp_path / "reached")}
    monkeypatch.setattr(os, "environ", {**os.environ, **variables})
    remove_unsafe_variables()
    exec(planted_faults.SWITCH, switch := {})
    assert [switch["planted"](number) for number in (3, 4)] == [True, False]
    assert (tmp_path / "reached").read_text() == "3\n4\n"
    assert all((ROOT / "megatron_sov/judge/rewards" / name).is_file() for name in planted_faults.SANDBOXED)
