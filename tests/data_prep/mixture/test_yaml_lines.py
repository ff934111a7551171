"""YAML with line numbers: equal to PyYAML's values, every mistake with its line, hostile files refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_prep.mixture.blend_file import YamlFile
from megatron_sov.errors import UserError

TEXT = "a: 1\nb:\n  - x\n  - {c: true, 3: 'no', d: null}\ne: 1.5e+3\n"


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "f.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_values_are_those_of_pyyaml(tmp_path: Path) -> None:
    for text in ("", "just a word", "- 1\n- [2, 3]\n", "a: 1\nb: [x, {c: null, d: 1.5e+3}]\n"):
        assert YamlFile(write(tmp_path, text)).value == yaml.safe_load(text)
    assert YamlFile(write(tmp_path, "{true: 1, 3: 2}")).value == {"true": 1, "3": 2}, "keys are words"


def test_mistakes_stand_in_order_of_their_lines(tmp_path: Path) -> None:
    file = YamlFile(write(tmp_path, TEXT))
    file.number(("e",), file.value["e"], 0, 100)
    file.wrong(("b", 1, "c"), "must be false")
    file.wrong(("b", 1, "missing"), "is missing")
    file.check_keys((), file.value, ("a", "b", "ee"))
    with pytest.raises(UserError) as e:
        file.raise_problems()
    where = tmp_path / "f.yaml"
    assert str(e.value).splitlines() == [
        f"{where}: 4 problems", f"  {where}:4: b.1.c = 'True': must be false",
        f"  {where}:4: b.1.missing: is missing",
        f"  {where}:5: e = '1500': must be a number, between 0 and 100",
        f"  {where}:5: e = '1500': is no key here (there are: a, b, ee); did you mean 'ee'?"]


@pytest.mark.parametrize("value", [True, "x", None, [1], float("nan"), float("inf"), 10**400, -1, 1.5])
def test_what_is_no_whole_number_in_bounds(tmp_path: Path, value: object) -> None:
    file = YamlFile(write(tmp_path, "n: 1"))
    assert file.number(("n",), value, 0, whole=True) == 0 and len(file.problems) == 1


@pytest.mark.parametrize(("text", "said"), [
    ("a: &x [*x]\n", "f.yaml:1: is no YAML (it is nested more than 20 deep)"),
    ("a: 1\nb: 2\na: 3\n", "f.yaml:3: a: is set twice"), ("a: [1\n", "is no YAML"),
    (b"a: \xff\n", "f.yaml: is no text in UTF-8"), ("? [a]\n: 1\n", "f.yaml:1: a key must be a word"),
    ("a: !!python/name:os.system ''\n", "f.yaml:1: "),
    ("x" * ((1 << 20) + 1), "a file of settings at most 1,048,576"),
    ("[" * 5000, "f.yaml:1: is nested more than 20 deep"), ("a: 1\n--- \nb: 2\n", "is no YAML"),
])
def test_hostile_files(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(UserError) as e:
        YamlFile(write(tmp_path, text))
    assert said in str(e.value)
