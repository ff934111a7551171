"""Licences as SPDX names them: by the text of a licence file, by the head of a source file."""

from __future__ import annotations

import re
from functools import lru_cache

LICENCE_FILE = re.compile(r"(?:(?:un)?licen[cs]es?|copying|copyright)(?:[.-][\w.-]+)?$", re.IGNORECASE)
HEAD_CHARS = 3000
"""Where a source file names its licence."""
MAX_TEXT_CHARS, MAX_LICENCE_BYTES = 60_000, 1 << 20
"""A longer text is a list of licences, and none of them; a larger file is not read."""
MAX_EDITS = 0.05
"""Share of a licence's text that may differ, as names and years do."""
_SPDX = re.compile(r"SPDX-License-Identifier:\s*([\w.+() -]+?)\s*(?:\*/|-->|$)", re.MULTILINE)
_HEADERS = (
    ("Apache-2.0", r"licensed under the apache license,? version 2\.0"),
    ("AGPL-3.0-or-later", r"gnu affero general public license.{0,200}either version 3"),
    ("LGPL-3.0-or-later", r"gnu lesser general public license.{0,200}either version 3"),
    ("LGPL-2.1-or-later", r"gnu lesser general public license.{0,200}either version 2\.1"),
    ("GPL-3.0-or-later", r"gnu general public license.{0,200}either version 3"),
    ("GPL-2.0-or-later", r"gnu general public license.{0,200}either version 2"),
    ("GPL-2.0-only", r"gnu general public license,? version 2(?!.{0,80}\bor\b)"),
    ("MPL-2.0", r"subject to the terms of the mozilla public license,? v\. 2\.0"),
    ("BSD-3-Clause", r"redistribution and use in source and binary forms.{0,1200}neither the name"),
    ("BSD-2-Clause", r"redistribution and use in source and binary forms"),
    ("MIT", r"permission is hereby granted, free of charge, to any person obtaining a copy"),
    ("ISC", r"permission to use, copy, modify, and/or distribute this software for any purpose"),
)
"""SPDX name -> what the head of a file says, with small letters and single spaces, the particular before the
general."""
_COMMENT_SIGNS = re.compile(r"(?m)^[ \t]*(?:#+|//+|/?\*+/?|;+|--+|%+|\"\"\"|<!--)")


def header_licence(text: str) -> str:
    """Return the licence that a source file names in its head, "" where it names none."""
    head = text[:HEAD_CHARS]
    if found := _SPDX.search(head):
        return found[1].strip()
    plain = " ".join(_COMMENT_SIGNS.sub(" ", head).lower().split())
    return next((name for name, pattern in _HEADERS if re.search(pattern, plain)), "")


@lru_cache(maxsize=256)
def licence_of_text(text: str) -> str:
    """Return the licence whose text this is, "" where it is none that is known: the nearest by edits, which
    have to be few."""
    import ukkonen
    from identify.vendor import licenses

    if found := _SPDX.search(text[:HEAD_CHARS]):
        return found[1].strip()
    if len(text) > MAX_TEXT_CHARS:
        return ""
    plain = _plain(text)
    most = int(MAX_EDITS * len(plain))
    best, name = most + 1, ""
    for spdx, licence in licenses.LICENSES:
        other = _plain(licence)
        if plain == other:
            return str(spdx)
        if abs(len(plain) - len(other)) <= most:
            edits = ukkonen.distance(plain, other, most + 1)
            if edits < best:
                best, name = edits, str(spdx)
    return name


def _plain(text: str) -> str:
    """Return a licence's text without lines of copyright and white space."""
    lines = (line for line in text.strip().split("\n")
             if not re.match(r"\s*copyright\b.*\d{4}|\s*copyright \(c\)", line, re.IGNORECASE))
    return " ".join(" ".join(lines).lower().split())
