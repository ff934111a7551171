"""Web pages: extraction of the main text and its structure, and detection of the encoding."""

import pytest

from data_prep.curate.sources.encodings import decode_page
from data_prep.curate.sources.html import extract_page_text
from data_prep.curate.sources.source import RawDocument
from megatron_sov.base.documents import BadRecord

SENTENCE = "A sentence that is long enough to be read by somebody who came here to read it. "
MENU = "".join(f'<li><a href="/{n}">Part {n}</a></li>' for n in range(8))
PAGE = f"""<!doctype html><html lang="en"><head><title>The title</title><script>bad()</script>
<link rel="canonical" href="https://a.example/page">
<meta property="article:published_time" content="2026-01-02">
<link rel="license" href="https://creativecommons.org/licenses/by-sa/4.0/"></head><body>
<header><div class="logo">Site</div></header><nav><ul>{MENU}</ul></nav>
<div class="sidebar"><p>{SENTENCE[:40]}</p></div>
<main><h1>Head<a class="headerlink" href="#x">¶</a></h1><p>{SENTENCE * 3} <b>Bold</b>
and <code>code()</code>.</p><h2>List</h2><ul><li>one<ul><li>inner</li></ul></li><li>two</li></ul>
<ol start="3"><li>three</li><li>four</li></ol>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2 <i>x</i></td></tr></table>
<div class="highlight-python3"><pre>def f():
    return 1
</pre></div><p hidden>unseen</p><p style="display: none">unseen</p></main>
<footer>Copyright by everybody</footer></body></html>"""


def test_a_page_becomes_its_main_text_with_structure() -> None:
    text, facts = extract_page_text(PAGE)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    assert lines[:3] == ["Head", f"{(SENTENCE * 3).strip()} Bold and code().", "List"]
    assert "def f():\n    return 1" in text and "\u2022 one" in text
    assert not any(word in text for word in ("unseen", "Part 3", "Copyright", "bad()", "\u00b6"))
    assert facts == {"title": "The title", "url": "https://a.example/page", "date": "2026-01-02",
                     "licence": "CC-BY-SA-4.0", "language_hint": "en"}


def test_a_whole_page_includes_navigation_and_footer() -> None:
    text, _ = extract_page_text(PAGE, whole=True)
    assert "Part 3" in text and "Copyright by everybody" in text and "unseen" not in text


@pytest.mark.parametrize("around", [
    f"<div class='nav-bar'><ul>{MENU}</ul></div>", f"<div role='navigation'><ul>{MENU}</ul></div>",
    f"<aside><p>{SENTENCE[:50]}</p></aside>", "<div id='cookie-consent'>We use cookies</div>",
    f"<div><ul>{MENU}</ul></div>", "<div class='breadcrumbs'><a>a</a> / <a>b</a></div>",
    "<div class='footer'>All rights reserved</div>"])
def test_navigation_is_removed_from_pages_without_a_main_element(around: str) -> None:
    body = f"<p>{SENTENCE * 4}</p>"
    for page in (around + body, body + around):
        assert extract_page_text(f"<html><body><div>{page}</div></body></html>")[0] == (SENTENCE * 4).strip()


@pytest.mark.parametrize(("source", "expected"), [
    ("한국어\n문장입니다", "한국어 문장입니다"),
    ("two<br>lines", "two\nlines"), ("<ruby>漢字<rp>(</rp><rt>かんじ</rt><rp>)</rp></ruby>です", "漢字です"),
    ('<math><mi>x</mi><annotation encoding="application/x-tex">x^2</annotation></math>', "$x^2$"),
    ('a <img class="math inline" alt="y^2" src="a.png"> b', "a $y^2$ b"), ("soft\u00adhyphen", "softhyphen")])
def test_inline_text_equals_the_text_in_a_browser(source: str, expected: str) -> None:
    assert extract_page_text(f"<body><p>{source}</p></body>")[0] == expected


def test_self_closed_xhtml_elements_are_empty() -> None:
    head = '<html xmlns="http://www.w3.org/1999/xhtml"><head><title/><script src="a"/></head>'
    assert extract_page_text(f"{head}<body><p>Text.</p></body></html>")[0] == "Text."


KOREAN = "<html><body><p>안녕하세요 여러분, 이것은 오래된 부호로 쓰인 문장입니다.</p></body></html>"


@pytest.mark.parametrize(("raw", "declared"), [
    (KOREAN.encode(), ""), (KOREAN.encode(), "euc-kr"), (KOREAN.encode("cp949"), "euc-kr"),
    (KOREAN.replace("<html>", "<html><meta charset=ks_c_5601-1987>").encode("cp949"), ""),
    (b"\xff\xfe" + KOREAN.encode("utf-16-le"), "utf-8"), (KOREAN.encode("cp949"), "")])
def test_the_encoding_of_a_page_is_detected_like_in_browsers(raw: bytes, declared: str) -> None:
    assert "오래된 부호로" in decode_page(raw, declared)


def test_a_wrong_encoding_declaration_is_ignored() -> None:
    text = "Die größeren Städte liegen an den großen Flüssen, und über sie führen viele schöne Brücken. " * 9
    assert decode_page(text.encode("latin-1"), "utf-8") == text


def test_bytes_without_any_encoding_are_refused() -> None:
    with pytest.raises(BadRecord, match="zero bytes"):
        decode_page(bytes(range(256)) * 40)


@pytest.mark.parametrize(("content", "code"), [
    ("<div>" * 50_000 + "deep", None), ("<ul>" * 50_000 + "deep", None), ("<pre" * 50_000, "no_text"),
    ("", "no_text"), ("<html></html>", "no_text"),
    ("<p>" + "&#0;&#xD800;\x00x" * 10, None), ("<!DOCTYPE x [<!ENTITY a 'b'>]><p>&a;</p>", None)])
def test_hostile_pages_become_text_or_a_broken_record(read, content: str, code: str | None) -> None:
    records = read({"a.html": content})
    assert len(records) == 1
    assert getattr(records[0], "code", None) == code
    if isinstance(records[0], RawDocument):
        records[0].text.encode()


def test_a_deeply_nested_page_is_read_to_its_end() -> None:
    page = "<p>First.</p>" + "<div>" * 400 + f"<p>{SENTENCE}</p>" + "</div>" * 400 + "<p>Last.</p>"
    assert extract_page_text(page)[0].split("\n") == ["First.", "", SENTENCE.strip(), "", "Last."]
