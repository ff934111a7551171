"""From words on pages to text: columns, running heads, hyphens, tables, code, Korean and Japanese."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from data_prep.curate.sources.pdf_layout import (
    HYPHEN, Page, PdfVocabulary, Word, columns_of, joined, pages_text)
from data_prep.curate.sources.source import Broken, Raw

# PDF files: written here by hand, read back; and those that cannot be read.

def pdf(pages: list[str], *, info: str = "") -> bytes:
    """Return a PDF with the given page contents, in Helvetica."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = ["<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Count {len(pages)}/Kids[{kids}]>>",
               "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"]
    for n, content in enumerate(pages):
        objects.append(f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Contents {5 + 2 * n} 0 R"
                       "/Resources<</Font<</F 3 0 R>>>>>>")
        objects.append(f"<</Length {len(content)}>>stream\n{content}\nendstream")
    objects.append(f"<<{info}>>")
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj{body}endobj\n".encode("latin-1")
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    return out + (f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer<</Size {len(objects) + 1}"
                  f"/Root 1 0 R/Info {len(objects)} 0 R>>\nstartxref\n{len(out)}\n%%EOF").encode()


def shown(*lines: tuple[int, int, str]) -> str:
    """Return the content of a page with lines at places."""
    return "BT /F 12 Tf " + " ".join(f"1 0 0 1 {x} {y} Tm ({text}) Tj" for x, y, text in lines) + " ET"


def test_a_file_is_a_document_with_its_title_and_date(read) -> None:
    content = pdf([shown((50, 700, "The first line of a paragraph"), (50, 686, "goes on in the second."))],
                  info="/Title(A title)/CreationDate(D:20260102030405Z)")
    assert read({"a.pdf": content}) == [Raw(
        "The first line of a paragraph goes on in the second.", "a.pdf",
        {"title": "A title", "date": "2026-01-02", "num_pages": 1})]


def test_columns_of_a_real_file(read) -> None:
    lines = [(x, 700 - 14 * n, f"{side} number {n} of the column")
             for n in range(6) for x, side in ((40, "left"), (320, "right"))]
    text = read({"a.pdf": pdf([shown(*lines)])})[0].text
    assert text.index("left number 5") < text.index("right number 0")


@pytest.mark.parametrize(("content", "code"), [
    (pdf([""]), "no_text"), (b"%PDF-1.7\nnothing", "pdf"), (b"", "pdf"),
    (pdf([shown((1, 1, "x"))])[:300], None),
    (pdf([shown((50, 700, "x"))] * 30), "too_long")])
def test_files_that_cannot_be_read_are_told(read, content: bytes, code: str | None) -> None:
    told = read({"a.pdf": content, "b.txt": "next"}, "pdf", path="a.pdf", max_pages=20)[0]
    assert isinstance(told, Broken) if code else isinstance(told, (Broken, Raw))
    assert code is None or told.code == code


def test_pages_that_hold_one_another_end(read) -> None:
    content = pdf([shown((50, 700, "text"))]).replace(b"/Kids[4 0 R]", b"/Kids[2 0 R]")
    found = read({"a.pdf": content, "b.txt": "next"}, time_s=5.0)
    assert found[-1] == Raw("next", "b.txt") and isinstance(found[0], Broken)


SIZE = 10.0
LETTER = 5.0


def line(text: str, x: float, y: float, size: float = SIZE, fixed: bool = False) -> list[Word]:
    """Return words as a printer would set them; a tab is a wide gap."""
    words = []
    for cell in text.split("\t"):
        for word in cell.split():
            width = LETTER * len(word) * size / SIZE
            words.append(Word(word, x, y, x + width, y + size, size, fixed))
            x += width + LETTER * size / SIZE
        x += 40
    return words


def lines(texts: Iterable[str], x: float = 50, y: float = 100, step: float = 12) -> list[Word]:
    return [word for n, text in enumerate(texts) for word in line(text, x, y + step * n)]


def text_of(*pages: list[Word]) -> str:
    return pages_text([Page(words) for words in pages])


def test_lines_become_paragraphs() -> None:
    words = lines(["This is the first line of a paragraph", "and this the second one."]) + lines(
        ["Another paragraph stands further down", "and has two lines as well."], y=150)
    assert text_of(words) == ("This is the first line of a paragraph and this the second one.\n\n"
                              "Another paragraph stands further down and has two lines as well.")


LEFT = [f"left line {n} with some words" for n in range(6)]
RIGHT = [f"right line {n} with more words" for n in range(6)]


def test_columns_are_read_one_after_the_other_although_the_file_mixes_them() -> None:
    words = [word for pair in zip(lines(LEFT), lines(RIGHT, x=300), strict=True) for word in pair]
    assert text_of(words) == " ".join([*LEFT, *RIGHT])


def test_a_title_across_columns_ends_those_above_it() -> None:
    title = line("A title that goes across both of the columns of a page", 50, 190)
    words = (lines(LEFT) + lines(RIGHT, x=300) + title
             + lines([f"lower {text}" for text in LEFT], y=220) + lines(RIGHT, x=300, y=220))
    order = [text_of(block).partition(" ")[0] for block in columns_of(words)]
    assert order == ["left", "right", "A", "lower", "right"]


def test_a_table_is_no_column() -> None:
    rows = [f"name{n}\t{n * 11}\tyes" for n in range(6)]
    assert text_of(lines(rows)) == "\n".join(f"name{n} | {n * 11} | yes" for n in range(6))


def test_running_heads_and_page_numbers_go() -> None:
    bodies = [[f"{what} are the body of this page", f"and {what} stand in both of its lines."]
              for what in ("Apples", "Pears", "Plums", "Cherries", "Grapes")]
    pages = [line("The Book", 50, 20) + lines(body) + line(str(n + 7), 300, 780)
             for n, body in enumerate(bodies)]
    text = text_of(*pages)
    assert "The Book" not in text and text.count("are the body of this page and") == 5
    assert not any(piece.isdigit() and int(piece) in range(7, 12) for piece in text.split())
    assert "The Book" in pages_text([Page(words) for words in pages], keep_repeated=True)


def test_a_sentence_goes_on_over_a_page() -> None:
    first, second = lines(["A sentence that does not end on this"]), lines(["page but on the next one."])
    assert text_of(first, second) == "A sentence that does not end on this page but on the next one."


def test_a_table_of_contents_keeps_its_lines() -> None:
    words = lines(["1 Begin . . . . . . . . . . 1", "2 End . . . . . . . . . . . . 9"])
    assert text_of(words) == "1 Begin … 1\n2 End … 9"


def test_code_keeps_lines_and_indents() -> None:
    words = line("def f(x):", 50, 100, fixed=True) + line("return x", 50 + 4 * LETTER, 112, fixed=True)
    assert text_of(words) == "def f(x):\n    return x"


@pytest.mark.parametrize(("pieces", "known", "expected"), [
    (["an exam-", "ple of it"], "example", "an example of it"),
    (["a well-", "known fact"], "well-known", "a well-known fact"),
    (["state-", "of the art"], "state of state of", "state-of the art"),
    ([f"break{HYPHEN}", "able"], "", "breakable"),
    (["North-", "America"], "", "North-America"),
    (["日本語の文", "章です。"], "", "日本語の文章です。"),
    (["이 책은 학교", "에서 쓰는 책이다"], "", "이 책은 학교에서 쓰는 책이다"),
    (["이 책은 좋은", "책이다"], "", "이 책은 좋은 책이다"),
    (["프로그", "램을 쓴다"], "프로그램을", "프로그램을 쓴다"),
    (["one", "", "two"], "", "one two")])
def test_lines_are_joined_as_the_language_does(pieces: list[str], known: str, expected: str) -> None:
    assert joined(pieces, PdfVocabulary(known.split())) == expected


def test_no_page_is_no_text() -> None:
    assert text_of() == text_of([]) == ""
