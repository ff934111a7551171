"""YAML that users write: what it says, or one sentence with the field and the way out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_sov.clusters.yaml_file import read_text, read_yaml
from megatron_sov.errors import UserError


@dataclass(frozen=True)
class Part:
    __pydantic_config__ = {"extra": "forbid"}
    minutes: int = 5


@dataclass(frozen=True)
class Whole:
    __pydantic_config__ = {"extra": "forbid"}
    partition: str
    time_limit: str = "30"
    part: Part = Part()


def read(text: str) -> Whole:
    return read_yaml("site.yaml", text, Whole, (Part,), "profile")


def test_fields_become_those_of_the_class() -> None:
    assert read('partition: batch\ntime_limit: "2:00:00"\npart: {minutes: 7}\n') == Whole(
        "batch", "2:00:00", Part(7))


@pytest.mark.parametrize(("text", "says"), [
    ("partition: [\n", r"site.yaml: is no YAML (while parsing a flow node"),
    ("partition: !!int ''\n", "site.yaml: is no YAML (string index"),
    ("partition: 2025-13-45\n", "site.yaml: is no YAML (month"),
    ("partition: !!timestamp soon\n", "site.yaml: is no YAML ('NoneType'"),
    ("- batch\n", "site.yaml: profile = ['batch']: "), ("", "site.yaml: profile = None: "),
    ("partition: batch\npartitoin: x\n",
     "site.yaml: partitoin is no field of a profile; did you mean 'partition'?"),
    ("partitoin: batch\n", "site.yaml: partitoin is no field of a profile; did you mean 'partition'?"),
    ("partition: batch\npart: {minuets: 1}\n",
     "site.yaml: part.minuets is no field of a profile; did you mean 'minutes'?"),
    ("partition: batch\ntime_limit: 2:00:00\n",
     "site.yaml: time_limit = 7200: Input should be a valid string; put it in quotes"),
    ("partition: batch\npart: {minutes: soon}\n",
     "site.yaml: part.minutes = 'soon': Input should be a valid integer"),
    ("time_limit: '5'\n", "site.yaml: partition is missing; every profile needs it")])
def test_a_mistake_is_one_sentence(text: str, says: str) -> None:
    with pytest.raises(UserError) as raised:
        read(text)
    assert str(raised.value).startswith(says) and "\n" not in str(raised.value)


def test_a_file_that_is_no_text_or_may_not_be_read_is_named(tmp_path: Path) -> None:
    (file := tmp_path / "site.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserError,
                       match=r"site.yaml: is no text in UTF-8 \(byte 9 is 0xe9\); pass a YAML file"):
        read_text("site.yaml", file)
    with pytest.raises(UserError,
                       match=r"--cluster x: cannot be read \(Is a directory\); see to its permissions"):
        read_text("--cluster x", tmp_path)
    file.write_text("name: café\n", encoding="utf-8")
    assert read_text("site.yaml", file) == "name: café\n"


def test_a_file_that_is_no_settings_by_its_size_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    with file.open("wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(UserError, match=r"site.yaml: has 1,099,511,627,776 bytes, and a file of"):
        read_text("site.yaml", file)


def test_lists_of_lists_without_end_are_told_in_short() -> None:
    lists = "".join(f"  - &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 12))
    with pytest.raises(UserError, match="partition = ") as refusal:
        read(f"partition:\n  - &l0 [deep]\n{lists}")
    assert len(str(refusal.value)) < 2000


def test_merges_of_merges_do_not_fill_the_memory() -> None:
    lines = ["a0: &a0 {x0: 0, x1: 1, x2: 2}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 10)]
    with pytest.raises(UserError, match=r"site\.yaml: is no YAML .<< of more than 50,000 values"):
        read("\n".join(lines))
    assert read("partition: p\npart: {<<: {minutes: 7}}\n") == Whole("p", part=Part(7))
