"""PDF files: lines become paragraphs, and unreadable files become broken records."""

import pytest

from data_prep.curate.sources.pdf import join_lines
from data_prep.curate.sources.source import BrokenRecord, RawDocument


def build_pdf(pages: list[str], *, info: str = "") -> bytes:
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


def place_lines(*lines: tuple[int, int, str]) -> str:
    """Return the content of a page with lines at places."""
    return "BT /F 12 Tf " + " ".join(f"1 0 0 1 {x} {y} Tm ({text}) Tj" for x, y, text in lines) + " ET"


def test_a_file_is_a_document_with_its_title_and_date(read) -> None:
    content = build_pdf([place_lines((50, 700, "The first line of a paragraph"),
                                     (50, 686, "goes on in its second line."))],
                        info="/Title(A title)/CreationDate(D:20260102030405Z)")
    assert read({"a.pdf": content}) == [RawDocument(
        "The first line of a paragraph goes on in its second line.", "a.pdf",
        {"title": "A title", "date": "2026-01-02", "num_pages": 1})]


@pytest.mark.parametrize(("content", "code"), [
    (build_pdf([""]), "no_text"), (b"%PDF-1.7\nnothing", "pdf"), (b"", "pdf"),
    (build_pdf([place_lines((1, 1, "x"))])[:300], None)])
def test_unreadable_files_are_reported(read, content: bytes, code: str | None) -> None:
    record = read({"a.pdf": content, "b.txt": "next"}, "pdf", path="a.pdf")[0]
    if code is None:  # a truncated file may be readable
        assert isinstance(record, (BrokenRecord, RawDocument))
    else:
        assert isinstance(record, BrokenRecord) and record.code == code


def test_cyclic_pages_of_a_pdf_end(read) -> None:
    content = build_pdf([place_lines((50, 700, "text"))]).replace(b"/Kids[4 0 R]", b"/Kids[2 0 R]")
    records = read({"a.pdf": content, "b.txt": "next"}, time_s=5.0)
    assert records[-1] == RawDocument("next", "b.txt") and isinstance(records[0], BrokenRecord)


def test_running_heads_and_page_numbers_are_removed(read) -> None:
    texts = [f"{fruit} are on this page." for fruit in ("Apples", "Pears", "Plums")]
    pages = [place_lines((50, 780, "The Book"), (50, 700, text), (300, 20, str(7 + number)))
             for number, text in enumerate(texts)]
    assert read({"a.pdf": build_pdf(pages)})[0].text == "\n\n".join(texts)


def test_pages_with_running_heads_only_have_no_text(read) -> None:
    slides = [place_lines((50, 700, f"Slide {n}")) for n in range(4)]
    [record] = read({"a.pdf": build_pdf(slides)})
    assert isinstance(record, BrokenRecord)
    assert record.code == "no_text" and "running heads" in record.reason


@pytest.mark.parametrize(("lines", "expected"), [
    (["A line that is as long as others", "goes on in the line that follows", "to its end.", "A new one."],
     "A line that is as long as others goes on in the line that follows to its end.\nA new one."),
    (["an exam\ufffe", "ple of it"], "an example of it"),
    (["日本語の文", "章です。"], "日本語の文章です。"),
    (["ประเทศไทยเป็น", "ประเทศหนึ่ง"], "ประเทศไทยเป็นประเทศหนึ่ง"),
    (["이 책은 좋은", "책이다"], "이 책은 좋은 책이다"), ([], "")])
def test_lines_are_joined_by_the_rules_of_their_script(lines: list[str], expected: str) -> None:
    assert join_lines(lines) == expected
