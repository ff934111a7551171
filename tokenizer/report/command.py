"""Declare and run `sov-tokenizer report`, with the checks of numbers, white space and special tokens."""

import itertools
import random
import re
import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from megatron_sov.base.artifacts import format_json, sha256_file, write_output
from megatron_sov.base.errors import UserError, stop_check, suggest_name
from megatron_sov.base.outputs import check_page
from megatron_sov.base.pages.page import PageTable
from megatron_sov.base.settings import DeclaredCommand, Flag
from tokenizer.formats.reader import LoadedTokenizer, open_tokenizer
from tokenizer.report.check import TokenizerCheck, choose_verdict, format_token, format_tokens, render_report
from tokenizer.report.measures import (
    NUM_EXAMPLES, HeldoutTextOptions, NamedText, TokenizerMeasures, TokenizerPath, check_inventory,
    check_scalars, check_superwords, check_texts, get_token_bytes, measure_text, read_texts)

MAX_DIGITS = 12
NUMBERS_PER_LENGTH = 60
_DIGITS = re.compile(rb"[0-9]+")
MAX_SPACES, MAX_TABS = 64, 16
USUAL_INDENTS = (4, 8, 12, 16)
MIXED = ("\r\n", "\r\n\r\n", "\t \t ", " \n", "\n \n", "\u3000", "\u00a0\u00a0", " \t\n\r\n  x")
EXAMPLES = ("\n    x", "\n        x", "\n\tx", "\n\n\nx", "a  b", "a\r\nb", "\n \n x")
_CONTROL = re.compile(r"\s*[<\[{|].*[>\]}|]\s*", re.DOTALL)
"""Shape of control tokens; other added tokens, such as runs of spaces, are meant to match in text."""
CHECKS = ("texts", "used", "inventory", "superwords", "digits", "whitespace", "scalars", "neutral")
"""Check names in report order."""
NEED_TEXT = frozenset(["texts", "used"])


def check_used(tokenizer: LoadedTokenizer, measured: list[TokenizerMeasures]) -> TokenizerCheck:
    """Count the tokens that do not occur in the texts."""
    counts = np.sum([m.counts for m in measured], axis=0)
    ordinary = np.array(sorted(tokenizer.tokens))
    unused = ordinary[counts[ordinary] == 0]
    thresholds = [10 ** k for k in range(7) if 10 ** k <= counts.max()]
    at_least = {n: int((counts[ordinary] >= n).sum()) for n in thresholds}
    by_text = {m.text.name: int((m.counts[ordinary] > 0).sum()) for m in measured}
    num_bytes = sum(m.text.num_bytes for m in measured)
    examples = unused[::max(1, len(unused) // NUM_EXAMPLES)][:NUM_EXAMPLES]
    share = len(unused) / len(ordinary)
    tokens = {int(i): format_token(tokenizer.tokens[int(i)]) for i in examples}
    numbers = {"num_never_used": len(unused), "share_never_used": share, "num_bytes": num_bytes,
               "used_at_least": at_least, "used_by_text": by_text,
               "examples": [{"id": i, "token": token} for i, token in tokens.items()]}
    summary = (f"{len(unused):,} of {len(ordinary):,} tokens ({share:.1%}) do not occur in "
               f"{num_bytes / 1e6:.2f} MB of text"
               + ("; more text would use more of them" if share > 0.1 else ""))
    rows = [[token, f"{i:,}"] for i, token in tokens.items()]
    return TokenizerCheck("used", "Never used", "note" if share > 0.5 else "good", summary, numbers,
                          [PageTable(["never used: a sample over all ids", "id"], rows)] if rows else [])


def count_digits_per_token(tokenizer: LoadedTokenizer, number: str) -> tuple[int, ...]:
    """Return digits per token, from the left."""
    pieces = get_token_bytes(tokenizer, f"n={number}")
    digits = (sum(len(run) for run in _DIGITS.findall(piece)) for piece in pieces)
    return tuple(n for n in digits if n)


def check_digits(tokenizer: LoadedTokenizer) -> TokenizerCheck:
    """Check how numbers of 1 to 12 digits are split: into digits, by length, or depending on the digits."""
    multi_digit = [i for i, token in sorted(tokenizer.tokens.items()) if _has_several_digits(token)]
    generator = random.Random(0)
    learned = [run.decode() for i in multi_digit for run in _DIGITS.findall(tokenizer.tokens[i])]
    by_length = {n: [f"{generator.randrange(10 ** (n - 1), 10 ** n)}" for _ in range(NUMBERS_PER_LENGTH)]
                 for n in range(1, MAX_DIGITS + 1)}
    for number in learned[:2000]:
        if len(number) <= MAX_DIGITS:
            by_length[len(number)].append(number)
    shapes = {n: _collect_shapes(tokenizer, numbers) for n, numbers in by_length.items()}
    single = all(shape == (1,) * n for n, splits in shapes.items() for shape in splits)
    regular = all(len(splits) == 1 for splits in shapes.values())
    verdict = choose_verdict(not regular, multi_digit or not single)
    sentence = "the split of a number depends on its digits"
    if single:
        sentence = "every digit is a token of its own"
    elif regular:
        sentence = "numbers are split by their length alone"
    example = f", such as {format_token(tokenizer.tokens[multi_digit[0]])}" if multi_digit else ""
    summary = f"{sentence}; {len(multi_digit):,} tokens hold several digits{example}"
    numbers = {"single_digits": single, "regular": regular, "num_multi_digit_tokens": len(multi_digit),
               "multi_digit_tokens": [format_token(tokenizer.tokens[i]) for i in multi_digit[:200]],
               "shapes": {str(n): {_format_shape(s): number for s, number in splits.items()}
                          for n, splits in shapes.items()}}
    rows = []
    for n, splits in shapes.items():
        examples = [f"{_format_shape(s)} ({number})" for s, number in splits.items()]
        rows.append([str(n), f"{len(splits)}", "; ".join(examples[:4])])
    return TokenizerCheck("digits", "Digits", verdict=verdict, summary=summary, numbers=numbers,
                          tables=[PageTable(["digits", "ways", "groups, with an example"], rows)])


def _format_shape(shape: tuple[int, ...]) -> str:
    return "+".join(map(str, shape))


def _has_several_digits(token: bytes) -> bool:
    """Return whether a token contains two adjacent digits or numerals."""
    text = token.decode("utf-8", errors="replace")
    return any(a[0] == b[0] == "N" for a, b in itertools.pairwise(map(unicodedata.category, text)))


def _collect_shapes(tokenizer: LoadedTokenizer, numbers: list[str]) -> dict[tuple[int, ...], str]:
    shapes: dict[tuple[int, ...], str] = {}
    for number in numbers:
        shapes.setdefault(count_digits_per_token(tokenizer, number), number)
    return shapes


def check_whitespace(tokenizer: LoadedTokenizer) -> TokenizerCheck:
    """Check that decoding returns white space, and count indentation tokens for spaces and tabs."""
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
    costly = [n for n in USUAL_INDENTS if cost[" "][n - 1] > 1]
    verdict = choose_verdict(lost, costly)
    decoding = (f"{len(lost)} of {len(texts)} are not returned, such as {format_token(lost[0])}" if lost
                else "every run is returned")
    summary = (f"{len(white)} tokens are white space (longest: spaces {spaces}, tabs {tabs}, "
               f"line breaks {breaks}); {decoding}"
               + (f"; indentation by {', '.join(map(str, costly))} spaces takes more than one extra token"
                  if costly else ""))
    numbers = {"num_whitespace_tokens": len(white), "longest_spaces": spaces, "longest_tabs": tabs,
               "longest_line_breaks": breaks, "num_tried": len(texts),
               "not_given_back": [format_token(t) for t in lost],
               "tokens_more_for_spaces": cost[" "], "tokens_more_for_tabs": cost["\t"]}
    rows = [[format_token(text), format_tokens(get_token_bytes(tokenizer, text))] for text in EXAMPLES]
    return TokenizerCheck("whitespace", "Indentation and white space", verdict=verdict, summary=summary,
                          numbers=numbers, tables=[PageTable(["text", "tokens"], rows)])


def check_neutral(tokenizer: LoadedTokenizer) -> TokenizerCheck:
    """Check that ordinary text with a special token's spelling never becomes its id, and is returned.

    Otherwise a user could end a turn and speak for the assistant.  `num_ids_where_special_is_read` counts the
    ids that the library recognizes by default.
    """
    control = {i: t for i, t in sorted((tokenizer.special | tokenizer.added).items())
               if t and (i in tokenizer.special or _CONTROL.fullmatch(t))}
    contexts = (("", ""), ("please write ", " now"), ("a", "b"))
    tried = {i: [f"{before}{token}{after}" for before, after in contexts] for i, token in control.items()}
    become_ids, not_returned, by_default = [], [], []
    for id_, texts in tried.items():
        encoded = [tokenizer.encode(text) for text in texts]
        if any(set(ids) & control.keys() for ids in encoded):
            become_ids.append(id_)
        elif any(tokenizer.decode(ids) != tokenizer.normalize(text)
                 for ids, text in zip(encoded, texts, strict=True)):
            not_returned.append(id_)
        if any(id_ in tokenizer.encode_special(text) for text in texts):
            by_default.append(id_)
    bad = bool(become_ids or not_returned)
    summary = f"{len(control):,} special tokens tried in text: "
    if become_ids:
        summary += (f"{len(become_ids):,} become their ids even in ordinary text, such as "
                    f"{format_token(control[become_ids[0]])}")
    else:
        summary += "encoded as ordinary text (split_special_tokens=True in transformers) all stay text"
    if not_returned:
        summary += f"; {len(not_returned):,} are not returned"
    if by_default:
        summary += (f"; read as special tokens, {len(by_default):,} become ids, so never encode users' text "
                    "that way")
    numbers = {"num_tried": len(control), "become_ids_in_text": [control[i] for i in become_ids],
               "not_given_back": [control[i] for i in not_returned],
               "num_ids_where_special_is_read": len(by_default)}
    results = dict.fromkeys(control, "stays text") | dict.fromkeys(not_returned, "is not returned")
    results |= dict.fromkeys(become_ids, "becomes its id")
    rows = [[format_token(control[i]), f"{i:,}", format_tokens(get_token_bytes(tokenizer, control[i])) or "–",
             results[i]] for i in [*become_ids, *not_returned, *control][:NUM_EXAMPLES]]
    return TokenizerCheck("neutral", "Special tokens in users' text", "bad" if bad else "good", summary,
                          numbers,
                          [PageTable(["token", "id", "as ordinary text", "result"], rows)] if rows else [])


def check_all(tokenizer: LoadedTokenizer, texts: list[NamedText],
              skip: Collection[str] = ()) -> list[TokenizerCheck]:
    """Run the checks that are not in `skip`; without texts also leave out the checks in `NEED_TEXT`."""
    stop_check()
    names = [name for name in CHECKS if name not in skip and (texts or name not in NEED_TEXT)]
    measured = [measure_text(tokenizer, text) for text in tqdm(texts, "texts", disable=None)]
    runs: dict[str, Callable[[], TokenizerCheck]] = {
        "texts": lambda: check_texts(tokenizer, measured), "used": lambda: check_used(tokenizer, measured),
        "inventory": lambda: check_inventory(tokenizer), "superwords": lambda: check_superwords(tokenizer),
        "digits": lambda: check_digits(tokenizer), "whitespace": lambda: check_whitespace(tokenizer),
        "scalars": lambda: check_scalars(tokenizer), "neutral": lambda: check_neutral(tokenizer)}
    return [runs[name]() for name in tqdm(names, "checks", disable=None)]


@dataclass(frozen=True, kw_only=True)
class TokenizerReportOptions(HeldoutTextOptions):
    """Check a tokenizer and write the results to an HTML file that needs no network.

    Each check has a verdict (good, note, bad), numbers and examples. Pass held-out text, one --text per
    language or domain, to see bytes per token, the cost in context, and tokens that never occur."""

    tokenizer: TokenizerPath
    output: Annotated[Path, Flag(value="REPORT.html")]
    """HTML file to write."""
    json: Annotated[Path | None, Flag(value="FILE", writes=True)] = None
    """Write all numbers to a JSON file."""
    skip: Annotated[tuple[str, ...], Flag(value="CHECK")] = ()
    """Check to leave out; may be repeated."""


def run_report(args: TokenizerReportOptions) -> None:
    """Check a tokenizer and write the page. Raises `UserError`: an unreadable tokenizer or text, an unknown
    check, or an unwritable output."""
    for name in args.skip:
        if name not in CHECKS:
            raise UserError(f"--skip {name}: is no check{suggest_name(name, CHECKS)} (checks: "
                            f"{', '.join(CHECKS)})")
    check_page("--output", args.output)
    tokenizer = open_tokenizer(args.tokenizer)
    checks = check_all(tokenizer, read_texts(args.text, args.max_text_mb), args.skip)
    for check in checks:
        print(f"{check.verdict:>4}  {check.title}: {check.summary}")
    write_output(args.output, render_report(tokenizer, checks))
    if args.json is not None:
        results = {c.name: {"title": c.title, "verdict": c.verdict, "summary": c.summary,
                            "numbers": c.numbers} for c in checks}
        facts = {"tokenizer": str(args.tokenizer), "library": tokenizer.library,
                 "vocab_size": tokenizer.vocab_size, "sha256": sha256_file(tokenizer.file)}
        write_output(args.json, format_json(facts | {"checks": results}))
    print(f"{args.output}: opens in any browser without a network")


REPORT = DeclaredCommand(TokenizerReportOptions, run_report)
