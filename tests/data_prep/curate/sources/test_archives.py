"""Books and office documents: archives of XML, small ones written here."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import pytest

from data_prep.curate.sources.source import Broken, Raw

CONTAINER = """<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>
<rootfile full-path="OEBPS/content.opf" media-type="application/oebps-package+xml"/></rootfiles>
</container>"""
PACKAGE = """<package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata>
<dc:title>The Book</dc:title><dc:language>ko</dc:language><dc:creator>Somebody</dc:creator>
<dc:rights>https://creativecommons.org/licenses/by/4.0/</dc:rights></metadata><manifest>
<item id="two" href="b%20two.xhtml" media-type="application/xhtml+xml"/>
<item id="one" href="a.xhtml" media-type="application/xhtml+xml"/>
<item id="nav" href="nav.xhtml" properties="nav" media-type="application/xhtml+xml"/>
<item id="css" href="s.css" media-type="text/css"/></manifest>
<spine><itemref idref="nav"/><itemref idref="one"/><itemref idref="two"/></spine></package>"""
BOOK = {"META-INF/container.xml": CONTAINER, "OEBPS/content.opf": PACKAGE,
        "OEBPS/a.xhtml": "<html><body><h1>First</h1><p>첫 장</p></body></html>",
        "OEBPS/b two.xhtml": "<html><body><h1>Second</h1><p>둘째 장</p></body></html>",
        "OEBPS/nav.xhtml": "<html><body><ol><li>First</li></ol></body></html>"}
W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
WORD = {"word/document.xml": f"""<w:document {W}><w:body>
<w:p><w:pPr><w:pStyle w:val="Heading2"/></w:pPr><w:r><w:t>A title</w:t></w:r></w:p>
<w:p><w:r><w:t>Some </w:t></w:r><w:r><w:t>text.</w:t></w:r>
<w:del><w:r><w:delText>gone</w:delText></w:r></w:del></w:p>
<w:p><w:pPr><w:numPr/></w:pPr><w:r><w:t>one</w:t></w:r></w:p>
<w:p><w:pPr><w:numPr/></w:pPr><w:r><w:t>two</w:t></w:r></w:p>
<w:tbl><w:tr><w:tc><w:p><w:r><w:t>a</w:t></w:r></w:p></w:tc><w:tc><w:p><w:r><w:t>b</w:t></w:r></w:p></w:tc></w:tr>
<w:tr><w:tc><w:p><w:r><w:t>1</w:t></w:r></w:p></w:tc><w:tc><w:p/></w:tc></w:tr></w:tbl></w:body></w:document>""",
        "docProps/core.xml": '<c xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>T</dc:title></c>'}
NS = ('xmlns:o="urn:oasis:names:tc:opendocument:xmlns:office:1.0" '
      'xmlns:t="urn:oasis:names:tc:opendocument:xmlns:text:1.0" '
      'xmlns:b="urn:oasis:names:tc:opendocument:xmlns:table:1.0"')
OPEN = {"content.xml": f"""<o:document-content {NS}><o:body><o:text><t:h t:outline-level="2">A title</t:h>
<t:p>Some<t:s/>text<o:annotation><t:p>note</t:p></o:annotation>.</t:p>
<t:list><t:list-item><t:p>one</t:p></t:list-item><t:list-item><t:p>two</t:p></t:list-item></t:list>
<b:table><b:table-row><b:table-cell><t:p>a</t:p></b:table-cell><b:table-cell><t:p>b</t:p></b:table-cell>
</b:table-row><b:table-row><b:table-cell><t:p>1</t:p></b:table-cell><b:table-cell/></b:table-row></b:table>
</o:text></o:body></o:document-content>"""}
A = 'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main"'
SLIDES = {"ppt/presentation.xml": "<p/>",
          **{f"ppt/slides/slide{n}.xml": f"<s {A}><a:p><a:r><a:t>slide {n}</a:t></a:r></a:p></s>"
             for n in (10, 9, 1)}}
SHEET = {"xl/workbook.xml": "<w/>", "xl/sharedStrings.xml": "<s><si><t>이름</t></si><si><t>x</t></si></s>",
         "xl/worksheets/sheet1.xml": """<s><row><c t="s"><v>0</v></c><c><v>12.5</v></c></row>
<row><c t="s"><v>99</v></c><c t="inlineStr"><is><t>in</t></is></c></row></s>"""}
DOCUMENT = "## A title\n\nSome text.\n\n- one\n- two\n\n| a | b |\n"


def zipped(members: Mapping[str, str | bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return sink.getvalue()


def test_a_book_is_its_chapters_in_the_order_of_its_spine(read) -> None:
    assert read({"a.epub": zipped(BOOK)}) == [Raw(
        "# First\n\n첫 장\n\n# Second\n\n둘째 장", "a.epub",
        {"title": "The Book", "language_hint": "ko", "author": "Somebody", "licence": "CC-BY-4.0"})]


def test_chapters_can_be_documents(read) -> None:
    found = read({"a.epub": zipped(BOOK)}, "epub", split="chapter")
    assert [(one.place, one.text.partition("\n")[0]) for one in found] == [
        ("a.epub:1", "# First"), ("a.epub:2", "# Second")]


@pytest.mark.parametrize(("name", "members", "expected"), [
    ("a.docx", WORD, DOCUMENT + "| 1 |  |"), ("a.odt", OPEN, DOCUMENT + "| 1 |"),
    ("a.pptx", SLIDES, "slide 1\n\nslide 9\n\nslide 10"), ("a.xlsx", SHEET, "| 이름 | 12.5 |\n|  | in |")])
def test_office_documents_are_paragraphs_and_rows(
        read, name: str, members: dict[str, str], expected: str) -> None:
    assert [one.text for one in read({name: zipped(members)})] == [expected]


def test_names_that_lead_outside_are_members_like_others(read, tmp_path) -> None:
    book = {**BOOK, "../../escaped.xhtml": "<p>out</p>", "/etc/escaped": "x"}
    book["OEBPS/content.opf"] = PACKAGE.replace("a.xhtml", "../../../../etc/hostname")
    (told,) = read({"a.epub": zipped(book)})
    assert isinstance(told, Broken) and told.code == "zip" and "etc/hostname" in told.reason
    assert not list(tmp_path.parent.rglob("escaped*"))


ENTITIES = '<!DOCTYPE d [<!ENTITY a "{}">{}]>'.format("x" * 1000, "".join(
    f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 20}">' for n in range(6)))


@pytest.mark.parametrize(("name", "content", "code"), [
    ("a.epub", zipped(BOOK)[:300], "zip"), ("a.epub", b"", "zip"), ("a.epub", zipped({"x": "y"}), "zip"),
    ("a.epub", zipped({**BOOK, "META-INF/container.xml": "<c/>"}), "epub"),
    ("a.epub", zipped({**BOOK, "OEBPS/content.opf": "no xml"}), "xml"),
    ("a.docx", zipped({"word/document.xml": b" " * 40_000_000}), "bomb"),
    ("a.docx", zipped({"other": "x"}), "office"), ("a.odt", zipped({"content.xml": "<a/>"}), "no_text"),
    ("a.odt", zipped({"content.xml": ENTITIES + "<d>&g;</d>"}), "xml"),
    ("a.odt", zipped({"content.xml": '<!DOCTYPE d [<!ENTITY e SYSTEM "file:///etc/passwd">]><d>&e;</d>'}),
     "no_text"),
    ("a.odt", zipped({"content.xml": "<a>" * 100_000}), "xml")])
def test_archives_that_cannot_be_read_are_told(read, name: str, content: bytes, code: str) -> None:
    told, follows = read({name: content, "b.txt": "next"})
    assert isinstance(told, Broken) and told.code == code, told
    assert follows.text == "next"
