"""How numbers and white space are cut."""

from __future__ import annotations

import itertools
import random
import re
import unicodedata

from megatron_sov.pages.content import Table
from tokenizer.formats.loaders import Opened
from tokenizer.report.charts import lines
from tokenizer.report.check import Check, Verdict, cut, shown

MAX_DIGITS = 12
NUMBERS_PER_LENGTH = 60
NUM_EXAMPLES = 20
_DIGITS = re.compile(rb"[0-9]+")
MAX_SPACES, MAX_TABS = 64, 16
USUAL_INDENTS = (4, 8, 12, 16)
MIXED = ("\r\n", "\r\n\r\n", "\t \t ", " \n", "\n \n", "\u3000", "\u00a0\u00a0", " \t\n\r\n  x")
EXAMPLES = ("\n    x", "\n        x", "\n\tx", "\n\n\nx", "a  b", "a\r\nb", "\n \n x")


def pieces(tokenizer: Opened, text: str) -> list[bytes]:
    """Return the bytes of each token of a text."""
    return [tokenizer.tokens.get(i, b"") for i in tokenizer.encode(text)]


def digit_shape(tokenizer: Opened, number: str) -> tuple[int, ...]:
    """Return how many digits of a number each of its tokens holds, from the left."""
    digits = (sum(len(run) for run in _DIGITS.findall(piece)) for piece in pieces(tokenizer, f"n={number}"))
    return tuple(n for n in digits if n)


def check_digits(tokenizer: Opened) -> Check:
    """How numbers of 1 to 12 digits are cut: one by one, in regular groups,
    or depending on which digits they are."""
    several = [i for i, token in sorted(tokenizer.tokens.items()) if _several_digits(token)]
    draw = random.Random(0)
    learned = [run.decode() for i in several for run in _DIGITS.findall(tokenizer.tokens[i])]
    by_length = {n: [f"{draw.randrange(10 ** (n - 1), 10 ** n)}" for _ in range(NUMBERS_PER_LENGTH)]
                 for n in range(1, MAX_DIGITS + 1)}
    for number in learned[:2000]:
        if len(number) <= MAX_DIGITS:
            by_length[len(number)].append(number)
    shapes = {n: _shapes(tokenizer, numbers) for n, numbers in by_length.items()}
    single = all(shape == (1,) * n for n, found in shapes.items() for shape in found)
    regular = all(len(found) == 1 for found in shapes.values())
    verdict: Verdict = "good" if single and not several else "note" if regular else "bad"
    how = ("every digit is a token of its own" if single
           else "numbers are cut in groups that depend on their length alone"
           if regular else "how a number is cut depends on which digits it has")
    example = f", such as {shown(tokenizer.tokens[several[0]])}" if several else ""
    summary = f"{how}; {len(several):,} tokens hold several digits{example}"
    numbers = {"single_digits": single, "regular": regular, "num_multi_digit_tokens": len(several),
               "multi_digit_tokens": [shown(tokenizer.tokens[i]) for i in several[:200]],
               "shapes": {str(n): {_sum(s): number for s, number in found.items()}
                          for n, found in shapes.items()}}
    rows = [
        [str(n), f"{len(found)}", "; ".join(f"{_sum(s)} ({number})" for s, number in list(found.items())[:4])]
        for n, found in shapes.items()]
    return Check("digits", "Digits", verdict, summary, numbers,
                 [Table(["digits", "ways", "groups, with an example"], rows)])


def _sum(shape: tuple[int, ...]) -> str:
    return "+".join(map(str, shape))


def _several_digits(token: bytes) -> bool:
    """Return whether a token holds two digits, or numerals, side by side."""
    text = token.decode("utf-8", errors="replace")
    return any(a[0] == b[0] == "N" for a, b in itertools.pairwise(map(unicodedata.category, text)))


def _shapes(tokenizer: Opened, numbers: list[str]) -> dict[tuple[int, ...], str]:
    found: dict[tuple[int, ...], str] = {}
    for number in numbers:
        found.setdefault(digit_shape(tokenizer, number), number)
    return found


def check_whitespace(tokenizer: Opened) -> Check:
    """Indentation by 1 to 64 spaces and 1 to 16 tabs, line breaks and mixed white space: tokens,
    and whether it comes back."""
    indents = {" ": MAX_SPACES, "\t": MAX_TABS}
    base = len(tokenizer.encode("if x:\nreturn y"))
    cost = {unit: [len(tokenizer.encode(f"if x:\n{unit * n}return y")) - base for n in range(1, most + 1)]
            for unit, most in indents.items()}
    runs = [unit * n for unit, most in indents.items() for n in range(1, most + 1)]
    runs += [*("\n" * n for n in range(1, 9)), *MIXED]
    texts = [f"{before}{run}{after}" for run in runs for before, after in (("", ""), ("x", "y"), ("\n", "y"))]
    lost = [text for text, ids in zip(texts, tokenizer.encode_many(texts), strict=True)
            if tokenizer.decode(ids) != text]
    white = {id_: token for id_, token in tokenizer.tokens.items() if token and not token.strip(b" \t\r\n")}
    spaces, tabs, breaks = (max((len(t) for t in white.values() if not t.strip(unit)), default=0)
                            for unit in (b" ", b"\t", b"\n"))
    dear = [n for n in USUAL_INDENTS if cost[" "][n - 1] > 1]
    verdict: Verdict = "bad" if lost else "note" if dear else "good"
    comes_back = (f"{len(lost)} of {len(texts)} do not come back, such as {shown(lost[0])}" if lost
                  else "every run comes back")
    summary = (f"{len(white)} tokens are white space (longest: spaces {spaces}, tabs {tabs}, "
               f"line breaks {breaks}); {comes_back}"
               + (f"; indentation by {', '.join(map(str, dear))} spaces takes more than one token more"
                  if dear else ""))
    numbers = {"num_whitespace_tokens": len(white), "longest_spaces": spaces, "longest_tabs": tabs,
               "longest_line_breaks": breaks, "num_tried": len(texts),
               "not_given_back": [shown(t) for t in lost],
               "tokens_more_for_spaces": cost[" "], "tokens_more_for_tabs": cost["\t"]}
    drawn = lines(list(range(1, MAX_SPACES + 1)), {"spaces": cost[" "], "tabs": cost["\t"]},
                  ("indentation", "tokens more than without"), "What indentation of a line of code costs.")
    rows = [[shown(text), cut(pieces(tokenizer, text))] for text in EXAMPLES]
    return Check("whitespace", "Indentation and white space", verdict, summary, numbers,
                 [Table(["text", "tokens"], rows)], [drawn])
