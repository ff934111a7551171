"""Unify line ends from Windows, Word, mail and Linux.

U+0085 stays. It is a line end on mainframes, but in web text nearly always an ellipsis of Windows-1252
decoded as Latin-1, which the step `encoding` restores.
"""

# Longest first: text mode applied twice gives "\r\r\n". A vertical tab is a line break in Word and
# PowerPoint, a form feed separates pages in plain text.
_LINE_ENDS = ("\r\r\n", "\r\n", "\r", "\v", "\f", "\u2028", "\u2029")
_BLANKS = "\t \xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_BEFORE_BYTE_A0 = ("\u00c2", "\u00c3")


def unify_line_ends(text: str, *, is_code: bool = False) -> str:
    r"""Convert line ends to "\n" and remove trailing blanks.

    Args:
        text: as read.
        is_code: convert only `\r\n` and `\r`. Form feeds separate sections of source code, and trailing
            blanks are significant in Markdown, patches and string literals.
    """
    for line_end in _LINE_ENDS[:3] if is_code else _LINE_ENDS:
        text = text.replace(line_end, "\n")
    return text if is_code else strip_lines(text)


def strip_lines(text: str) -> str:
    """Remove trailing blanks from each line."""
    return "\n".join([_strip_line(line) for line in text.split("\n")])


def _strip_line(line: str) -> str:
    stripped = line.rstrip(_BLANKS)
    # "\u00c3" and a no-break space are a wrongly decoded "\u00e0", which the step `encoding` restores.
    if len(stripped) < len(line) and line[len(stripped)] == "\xa0" and stripped.endswith(_BEFORE_BYTE_A0):
        return stripped + "\xa0"
    return stripped
