"""The step `safety`: lists of words, sites and patterns, in the forms that they come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_prep.curate.pipeline.step import Doc, StepOutcome
from data_prep.curate.quality.safety import Safety, SafetyList, SafetySettings
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import problems_of
from tests.typed_words import keys_of


def outcome(file: Path, content: str, text: str = "", url: str = "", **settings) -> StepOutcome:
    file.write_text(content, encoding="utf-8")
    step = Safety(SafetySettings((SafetyList("list", file, **settings),)))
    step.start(None)
    return step.outcomes([Doc("a:0:0", text, "a", 0, 0, {"url": url})])[0]


@pytest.mark.parametrize(("text", "hits"), [
    ("Dreck! ein DRECK, Ｄｒｅｃｋ", 3), ("dreckig", 0), ("two bad\nwords and bad, words", 2), ("bad", 0),
    ("이것은 나쁜말이다", 1), ("좋은나쁜말", 0), ("这里有坏话吗", 1), ("คนพูดคำหยาบมาก", 1)])
def test_words_are_found_whole_and_in_scripts_without_spaces_anywhere(
        tmp_path: Path, text: str, hits: int) -> None:
    found = outcome(tmp_path / "words.txt", "# list\nDreck\nbad words\n나쁜말\n坏话\nคำหยาบ\n", text)
    assert found == StepOutcome(reason="safety list list" if hits else "",
                                values={"safety": f"list={hits}" if hits else ""})


@pytest.mark.parametrize(("url", "hits"), [
    ("https://bad.org/x", 1), ("http://www.bad.org", 1), ("https://sub.bad.org:8080/x?y", 1),
    ("https://notbad.org", 0), ("https://host.net/", 1), ("https://ads.com/x", 1),
    ("https://fine.org/bad/page?x=1", 1),
    ("https://fine.org/bad/page/more", 1), ("https://fine.org/bad", 0), ("https://fine.org/bad/pages", 0),
    ("", 0), ("http://[bad", 0), ("BAD.org", 1)])
def test_sites_and_addresses_are_found_with_what_lies_below(tmp_path: Path, url: str, hits: int) -> None:
    content = "bad.org\n0.0.0.0 host.net # hosts file\n||ads.com^$third-party\nhttps://fine.org/bad/page\n"
    found = outcome(tmp_path / "urls.txt", content, url=url, type="urls")
    assert found.values["safety"] == ("list=1" if hits else "")


def test_a_folder_of_domains_and_urls_is_one_list(tmp_path: Path) -> None:
    (tmp_path / "urls").write_text("fine.org/page\n")
    found = outcome(tmp_path / "domains", "bad.org\n", url="https://bad.org", type="urls")
    assert found.values["safety"] == "list=1"
    step = Safety(SafetySettings((SafetyList("ut1", tmp_path, "urls"),)))
    step.start(None)
    assert [step.outcomes([Doc("a", "", "a", 0, 0, {"url": url})])[0].reason
            for url in ("https://bad.org", "https://fine.org/page", "https://fine.org")] == [
        "safety list ut1", "safety list ut1", ""]


def test_patterns_count_and_drop_from_a_number_on(tmp_path: Path) -> None:
    file = tmp_path / "patterns.txt"
    assert outcome(file, r"\bbomb\w*", "Bombs, a bomb", type="patterns", drop_from=3) == StepOutcome(
        values={"safety": "list=2"})
    assert outcome(file, "x", "xxx", type="patterns", drop_from=0).reason == ""


def test_broken_lists_are_told_with_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.curate.quality.safety.PATTERN_TIMEOUT_S", 0.05)
    file = tmp_path / "list.txt"
    with pytest.raises(UserError, match=r"list\.txt:2: '\(' is no regular expression"):
        outcome(file, "a\n(\n", type="patterns")
    with pytest.raises(UserError, match="has no entry"):
        outcome(file, "# nothing\n")
    with pytest.raises(UserError, match=r"list\.txt:1: '---' has no letter"):
        outcome(file, "---\n")
    with pytest.raises(UserError, match="takes more than"):
        outcome(file, r"(?:a+)+$", "a" * 5000 + "b", type="patterns")
    file.write_bytes(b"\xff\xfe")
    step = Safety(SafetySettings((SafetyList("list", file),)))
    with pytest.raises(UserError, match="is not UTF-8"):
        step.start(None)


def test_every_broken_rule_of_the_settings_is_told(tmp_path: Path) -> None:
    wrong: Any = "sites"
    assert keys_of(SafetySettings((SafetyList("a b", tmp_path), SafetyList("x", tmp_path, wrong, -1)))) == [
        "lists.0.name", "lists.1.type", "lists.1.drop_from"]
    lists = (SafetyList("x", tmp_path), SafetyList("x", tmp_path / "none"),
             SafetyList("y", tmp_path / "list", "patterns"))
    (tmp_path / "list").write_text("a (b\n")
    problems = problems_of(SafetySettings(lists))
    assert [p.key for p in problems] == ["lists", "lists.0.file", "lists.1.file", "lists.2"]
    assert f"{tmp_path / 'list'}:1: 'a (b' is no regular expression: missing ) at" in problems[3].rule
    assert keys_of(SafetySettings()) == ["lists"]
