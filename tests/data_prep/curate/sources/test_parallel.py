"""Text in two languages as documents."""

from __future__ import annotations

import gzip

import pytest

from data_prep.curate.sources.formats import reader
from data_prep.curate.sources.source import Broken, Raw, SourceSettings
from megatron_sov.base.errors import UserError

TMX = """<?xml version="1.0"?><tmx version="1.4"><header/><body>
<tu><tuv xml:lang="en-US"><seg>Good <bpt i="1"/>day</seg></tuv><tuv xml:lang="ko"><seg>안녕</seg></tuv></tu>
<tu><tuv xml:lang="en"><seg>alone</seg></tuv></tu>
<tu><tuv xml:lang="ko"><seg>둘</seg></tuv><tuv xml:lang="en"><seg>two</seg></tuv></tu></body></tmx>"""


def texts(found: list[Raw | Broken]) -> list[str]:
    return [one.text if isinstance(one, Raw) else one.code for one in found]


def test_a_row_is_a_pair(read) -> None:
    assert read({"a.tsv": "one\t하나\tmore\n"}, "parallel") == [Raw("one\n하나", "a.tsv:1")]
    assert texts(read({"a.tsv": "one\t하나\nbad\ntwo\t\nthree\t셋\n"}, "parallel")) == [
        "one\n하나", "pair", "pair", "three\n셋"]


def test_a_template_and_several_pairs(read) -> None:
    found = read({"a.tsv": "a\t1\nb\t2\nc\t3\n"}, "parallel", pairs=2, languages=["en", "ko"],
                 names=["English", "Korean"],
                 template="{source_language}: {source}\n{target_language}: {target}")
    assert texts(found) == ["English: a\nKorean: 1\n\nEnglish: b\nKorean: 2", "English: c\nKorean: 3"]
    assert found[1].place == "a.tsv:3" and found[0].columns == {"language_pair": "en-ko"}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_two_files_of_lines(read, pack) -> None:
    ending = ".gz" if pack is gzip.compress else ""
    files = {f"x/d.en{ending}": pack(b"one\n\ntwo\n"), f"x/d.ko{ending}": pack("하나\n\n둘\n".encode())}
    assert texts(read(files, "parallel", languages=["en", "ko"])) == ["one\n하나", "two\n둘"]


@pytest.mark.parametrize(("other", "code"), [
    ({"d.ko": "하나\n셋\n"}, "pair"), ({"d.ko": "하나\n둘\n셋\n넷"}, "pair"), ({"d.ko": ""}, "pair")])
def test_of_files_of_different_lengths_nothing_is_paired_wrongly(read, other, code: str) -> None:
    assert texts(read({"d.en": "one\ntwo\nthree\n", **other}, "parallel", languages=["en", "ko"])) == [code]


def test_a_file_without_the_other_is_refused(tmp_path) -> None:
    (tmp_path / "d.en").write_text("x")
    source = SourceSettings("s", (".",), tmp_path, "parallel", options={"languages": ["en", "ko"]})
    with pytest.raises(UserError, match=r"d\.ko"):
        reader(source).pieces()


def test_units_of_tmx(read) -> None:
    assert texts(read({"a.tmx": TMX}, "parallel", languages=["ko", "en"])) == [
        "안녕\nGood day", "pair", "둘\ntwo"]
    assert texts(read({"a.tmx": TMX[:280]}, "parallel"))[-1] == "xml"


@pytest.mark.parametrize(("options", "told"), [
    ({"languages": ["en"]}, "languages"), ({"template": "{source}"}, "template"),
    ({"template": "{source} {target} {source.__class__}"}, "template"), ({"columns": [1, 1]}, "columns"),
    ({"pairs": 0}, "pairs"), ({"template": "{source} {target"}, "template"),
    ({"colums": [0, 1]}, "did you mean")])
def test_options_that_cannot_be_are_told(tmp_path, options, told) -> None:
    problems = SourceSettings("s", (".",), tmp_path, "parallel", options=options).problems()
    assert len(problems) == 1 and told in problems[0].sentence
