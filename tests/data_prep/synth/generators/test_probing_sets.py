"""`sov-data probing-sets`: what is frozen differs, stands in no training input, and stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main
from megatron_sov.base.artifacts import read_manifest

LONG = ("A beekeeper fills {} jars with honey on Monday and {} jars on Tuesday. How many jars has she filled "
        "on both days together?")
KOREAN = "양봉가가 월요일에 꿀을 {}병에 담고 화요일에 {}병에 담았다. 이틀 동안 담은 꿀은 모두 몇 병인가?"


def rows(folder: Path, name: str, *records: Any) -> str:
    (folder / name).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return str(folder / name)


def probe(text: str, domain: str = "algebra", **more: Any) -> dict[str, Any]:
    return {"prompt": text, "answer": "5", "domain": domain, **more}


def test_sets_are_frozen_without_what_training_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                   ) -> None:
    other = "Seven ships leave the harbour at dawn and twelve follow them at noon. How many are out at sea?"
    written = {"id": "a", "synthetic": {"model": "writer-7b"}}
    file = rows(tmp_path, "kept.jsonl", probe(LONG.format(2, 3), **written), probe(other, id="b"),
                probe(LONG.format(2, 3).upper()), probe("2 + 3?"),
                probe(KOREAN.format(2, 3), "geometry", id="c"),
                probe("세 변이 각각 3, 4, 5인 삼각형의 넓이와 둘레를 더하면 얼마인가?", "geometry"))
    train = rows(tmp_path, "train.jsonl", {"text": "Nothing of the kind."}, {"messages": [
        {"role": "user", "content": "So: " + other.replace(".", ";").upper().replace("E", "<b>E</b>")},
        {"role": "assistant", "content": KOREAN.format(2, 3)}]})
    (tmp_path / "made").mkdir()
    (tmp_path / "made/rejected.jsonl").write_text("{}\n")
    Path(file).rename(tmp_path / "made/kept.jsonl")
    words = ["probing-sets", "--input", str(tmp_path / "made"), "--against", train, "--output",
             str(tmp_path / "sets")]
    assert main(words) == 0
    content = read_manifest(tmp_path / "sets", "probing_sets").content
    assert content["domains"] == {"algebra": 1, "geometry": 1} and content["models"] == ["writer-7b"]
    assert content["left_out"] == {"repeated": 1, "too short to be looked for": 1, "in the training input": 2}
    (line,) = (tmp_path / "sets/algebra.jsonl").read_text().splitlines()
    assert json.loads(line) == {"prompt": LONG.format(2, 3), "answer": "5", "domain": "algebra", "id": "a"}
    assert "2 lines of training input read" in capsys.readouterr().out


@pytest.mark.parametrize(("record", "more", "said"), [
    ({"prompt": "a"}, [], "needs the texts prompt, answer and domain"),
    (probe("a b c d e f", ".."), [], 'domain = ".." must be a name'),
    (probe("a b c d e f", "x/../../y"), [], "must be a name"),
    (probe("2 + 2?"), [], "no problem of this domain"),
    (probe("a b c d e f"), ["--per-domain", "-1"], "--per-domain -1: must be at least 0"),
])
def test_mistakes_are_one_sentence(record: Any, more: list[str], said: str, tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    file = rows(tmp_path, "kept.jsonl", record)
    assert main(["probing-sets", "--input", file, "--output", str(tmp_path / "sets"), *more]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "sets").exists()
