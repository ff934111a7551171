"""One form of lines for all documents, whether they come from Windows, Word, a mail or Linux.

U+0085 is left alone.  It is a line end on mainframes, but in text from the web it is nearly always an
ellipsis of Windows-1252 read as Latin-1, which the step `encoding` restores.
"""

from __future__ import annotations

# Longest first: files that went through text mode twice have "\r\r\n".  A vertical tab is a line break in
# Word and PowerPoint, a form feed the border of two pages in plain text.
_LINE_ENDS = ("\r\r\n", "\r\n", "\r", "\v", "\f", "\u2028", "\u2029")
_BLANKS = "\t \xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_BEFORE_BYTE_A0 = ("\u00c2", "\u00c3")


def unify_line_ends(text: str, *, is_code: bool = False) -> str:
    r"""Return a text whose lines end with "\n" and not with blanks; lines of blanks alone become empty.

    Args:
        text: as it was read.
        is_code: change `\r\n` and `\r` alone.  Form feeds part sections of source code, and blanks at the
            end of a line mean something in Markdown, patches and string literals.
    """
    for line_end in _LINE_ENDS[:3] if is_code else _LINE_ENDS:
        text = text.replace(line_end, "\n")
    return text if is_code else strip_lines(text)


def strip_lines(text: str) -> str:
    """Return a text without the blanks at the ends of its lines."""
    return "\n".join([_strip_line(line) for line in text.split("\n")])


def _strip_line(line: str) -> str:
    stripped = line.rstrip(_BLANKS)
    # "\u00c3" and a no-break space are one letter "\u00e0" read in a wrong encoding, which can be restored.
    if len(stripped) < len(line) and line[len(stripped)] == "\xa0" and stripped.endswith(_BEFORE_BYTE_A0):
        return stripped + "\xa0"
    return stripped
