"""Pages laid out by tables lose what stands around their text; tables of data stay whole."""

from __future__ import annotations

import random
import time

import pytest

from data_prep.curate.sources.html import page_text

TEXTS = {
    "en": ["The old mill stands by the river, and people come to see it in spring.",
           "Its wheel was made of oak, and it turned for two hundred years without a rest.",
           "Nobody knows who built the house, but the door bears the year of the great flood."],
    "ko": ["낡은 물레방아는 강가에 서 있고, 봄이면 사람들이 그것을 보러 온다.",
           "바퀴는 참나무로 만들어졌으며, 이백 년 동안 쉬지 않고 돌았다.",
           "누가 그 집을 지었는지는 아무도 모르지만, 문에는 큰 홍수가 난 해가 적혀 있다."]}
AROUND = {
    "en": ("Section", "Category", "Buy cheap watches now!", "Copyright 2003 Example Inc.", "Sign in"),
    "ko": ("메뉴", "분류", "지금 시계를 싸게 사세요!", "저작권 2003 보기 회사", "로그인")}


def layout_page(seed: int, language: str, depth: int) -> str:
    """Return a page as around 2000: tables in one another, navigation, adverts and a footer in cells."""
    draw = random.Random(seed)
    menu, category, advert, notice, form = AROUND[language]
    joint = draw.choice([" | ", "<br>", " &middot; ", "&nbsp;&nbsp;"])
    top = joint.join(f'<a href="/{i}">{menu} {i}</a>' for i in range(draw.randint(4, 9)))
    begin, end = draw.choice([("", "<br>"), ("<li>", ""), ("<div>", "</div>")])
    left = "".join(f'{begin}<a href="/c/{i}">{category} {i}</a>{end}' for i in range(draw.randint(5, 15)))
    if draw.random() < 0.5:
        items = "".join(f'<tr><td><img src=dot.gif></td><td><a href="/c/{i}">{category} {i}</a></td></tr>'
                       for i in range(draw.randint(5, 15)))
        left = f"<table>{items}</table>"
    if draw.random() < 0.3:
        left = f"<form>{form} <input name=q></form>" + left
    right = f'<a href="/ad"><img src="ad.gif"></a><br>{advert} <a href="/ad">{advert[:12]}</a>'
    begin, end = draw.choice([("<h1>", "</h1>"), ("<b><font size=5>", "</font></b>")])
    paragraphs = "".join(f"<p>{' '.join(draw.choices(TEXTS[language], k=6))}</p>" for _ in range(3))
    text = f"{begin}{TEXTS[language][0][:20]}{end}{paragraphs}"
    for _ in range(depth - 1):
        text = f"<table width=100%><tr><td>{text}</td></tr></table>"
    cells = [f'<td width=150 class="{draw.choice(["", "menu", "left"])}">{left}</td>', f"<td>{text}</td>",
             f"<td>{right}</td>"]
    middle = "".join(cells if draw.random() < 0.7 else [cells[1], cells[0]])
    bottom = f'{notice} <a href="/p">{menu} p</a> <a href="/t">{menu} t</a>'
    rows = [f"<tr><td colspan=3>{top}</td></tr>", f"<tr>{middle}</tr>",
            f"<tr><td colspan=3>{bottom}</td></tr>"]
    if draw.random() < 0.4:  # each part has a table of its own
        tables = [f"<table width=100%>{row}</table>" for row in rows]
        rows = [f"<tr><td>{table}</td></tr>" for table in tables] if draw.random() < 0.5 else tables
    body = "".join(rows)
    return f"<html><body>{body if body.startswith('<table') else f'<table>{body}</table>'}</body></html>"


@pytest.mark.parametrize("language", ["en", "ko"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_pages_laid_out_by_tables_are_their_text(language: str, depth: int) -> None:
    for seed in range(25):
        text, _ = page_text(layout_page(seed, language, depth))
        assert not [part for part in AROUND[language] if part in text], (seed, text)
        assert sum(text.count(sentence) for sentence in TEXTS[language]) == 18, (seed, text)
        assert TEXTS[language][0][:20] in text


SENTENCE = " ".join(TEXTS["en"])
TABLES = {
    "index": "".join(f"<tr><td><a href=/{i}>Book {i}</a></td><td>Author {i}</td><td>{1900 + i}</td></tr>"
                     for i in range(12)),
    "downloads": "".join(f"<tr><td><a href=/{i}>file-{i}.tar.gz</a></td><td>{i}2K</td><td>2003-01-0{i}</td>"
                         "</tr>" for i in range(1, 4)),
    "head": "<tr><th>Name</th><th>Home</th></tr>" + "".join(
        f"<tr><td><a href=/{i}>Name {i}</a></td><td><a href=/h{i}>Home {i}</a></td></tr>" for i in range(3)),
    "caption": "<caption>Links</caption><tr><td><a href=/a>One</a></td><td><a href=/b>Two</a></td></tr>",
    "glossary": "".join(f"<tr><td><a href=/{i}>Term {i}</a></td><td>{SENTENCE}</td></tr>" for i in range(6)),
    "paragraphs": "".join(f"<tr><td><p><a href=/{i}>Part {i}</a></p></td><td><p>{SENTENCE}</p></td></tr>"
                          for i in range(5)),
    "infobox": f"<caption>Mill</caption><tr><td>Built</td><td><a href=/y>1802</a></td></tr><tr><td colspan=2>"
               f"<table><tr><td><a href=/m>Map</a></td></tr></table>{SENTENCE}</td></tr>",
    "figures": "".join(f"<tr><td>{i}</td><td>{i * i}</td><td>{i ** 3}</td></tr>" for i in range(3)),
    "copyright": "<tr><td>Copyright 1999</td><td>Ann</td></tr><tr><td>Copyright 2001</td><td>Ben</td></tr>",
    "one column": "".join(f"<tr><td><a href=/{i}>Story {i}</a> {TEXTS['en'][i % 3]}</td></tr>"
                          for i in range(9))}


@pytest.mark.parametrize("outer", [
    "<p>{text}</p><table>{table}</table>",
    "<table><tr><td><a href=/>Start</a></td><td><p>{text}</p><table>{table}</table></td></tr></table>"])
@pytest.mark.parametrize("table", TABLES)
def test_tables_of_data_stay_whole(table: str, outer: str) -> None:
    page = outer.format(text=SENTENCE * 3, table=TABLES[table])
    text, _ = page_text(f"<html><body>{page}</body></html>")
    alone, _ = page_text(f"<html><body><p>{SENTENCE * 3}</p><table>{TABLES[table]}</table></body></html>",
                         whole=True)
    assert text.split() == alone.split()


def test_a_list_of_links_with_its_figures_stays() -> None:
    rows = "".join(f"<tr><td>{i}.</td><td><a href=v></a></td><td><a href=/{i}>A story about number {i}</a> "
                   f"(site{i})</td></tr><tr><td colspan=2></td><td>{i} points by <a href=u>user{i}</a> | "
                   f"<a href=c>{i} comments</a></td></tr><tr></tr>" for i in range(1, 31))
    bar = "<table><tr><td><a href=/>News</a></td><td><a href=n>new</a> | <a href=p>past</a></td></tr></table>"
    page = (f"<center><table><tr><td>{bar}</td></tr><tr><td><table>{rows}</table></td></tr>"
            "<tr><td><a href=g>Guidelines</a> | <a href=f>FAQ</a></td></tr></table></center>")
    text, _ = page_text(f"<html><body>{page}</body></html>")
    assert text.count("A story about number") == text.count("points by") == 30
    assert "past" not in text and "Guidelines" not in text


@pytest.mark.parametrize("page", [
    "".join(f"<tr><td><a href=/{i}>Link {i}</a></td></tr>" for i in range(9)),
    "<tr><td><a href=/>Start</a></td><td>A short text.</td></tr>",
    "<tr><td>Copyright 2003</td></tr>", "<tr><td><form>Name <input></form></td></tr>"])
def test_a_page_of_links_alone_keeps_them(page: str) -> None:
    page = f"<html><body><table>{page}</table></body></html>"
    assert page_text(page)[0].split() == page_text(page, whole=True)[0].split() != []


def test_a_title_is_no_navigation() -> None:
    cells = "<tr><td><h1><a href=/>Home</a> / The mill</h1></td></tr><tr><td class=header>By Ann</td></tr>"
    text, _ = page_text(f"<body><table>{cells}<tr><td>{SENTENCE * 2}</td></tr></table></body>")
    assert text.startswith("# Home / The mill") and "By Ann" in text


def test_large_tables_and_many_links_take_linear_time() -> None:
    began = time.process_time()
    page_text("<table>" + ("<tr>" + "<td>x</td>" * 10 + "</tr>") * 1000 + "</table>"
              + "<a rel=nofollow href=/>x</a>" * 5000)
    assert time.process_time() - began < 20  # about 0.2 s; 70 s where lists are read by their places
