"""A comparison as a page."""

from __future__ import annotations

from typing import Any

from megatron_sov.pages.charts import Chart
from megatron_sov.pages.content import Chapter, Section, Table
from megatron_sov.pages.page import render as render_page
from tokenizer.report.charts import bars


def render(found: dict[str, Any]) -> str:
    """Return the HTML of what `compare` found."""
    names = list(found["tokenizers"])
    sections = [Section(title, text, charts, tables) for title, text, charts, tables in (
        ("Bytes per token", "UTF-8 bytes of text in a token: more is cheaper in context, memory and time.",
         [_by_text(found, "bytes_per_token", "bytes per token")],
         [text_table(found, "bytes_per_token", "{:.3f}")]),
        ("Tokens per word", "Words are parted by white space; a dash stands where a text has none.", [],
         [text_table(found, "tokens_per_word", "{:.3f}"),
          text_table(found, "tokens_per_char", "{:.3f}", "tokens per character")]),
        ("Cost", f"Against {names[0]}: tokens are context, cache and generation steps; FLOPs also count the "
                 f"head of each vocabulary, in a model of {found['body_params'] / 1e9:g} B parameters "
                 f"without embedding and head and of hidden size {found['hidden_size']:,}. "
                 "Training costs three times the FLOPs of inference, so the ratios are the same.",
         [_by_text(found, "relative_flops", f"FLOPs against {names[0]}")],
         [text_table(found, "relative_tokens", "{:.3f}", "tokens"),
          text_table(found, "relative_flops", "{:.3f}", "FLOPs")]),
        ("Shared vocabulary", "Tokens with the same bytes, special ones left out.", [],
         [overlap_table(found)]),
        ("Cut differently", "Frequent words, and lines with the largest ratio of tokens.", [],
         _cut_tables(found)),
    )]
    return render_page("Tokenizer comparison", " / ".join(names),
                       f"{len(names)} tokenizers on {len(found['texts'])} texts.",
                       [Chapter("Comparison", "", [], sections)], anchor="comparison",
                       overview=("Tokenizers", model_table(found)))


def _by_text(found: dict[str, Any], key: str, axis: str) -> Chart:
    series = {name: [t["texts"][text][key] for text in found["texts"]]
              for name, t in found["tokenizers"].items()}
    return bars(found["texts"], series, axis, f"{axis[0].upper()}{axis[1:]} of each text.")


def text_table(found: dict[str, Any], key: str, form: str, title: str = "text") -> Table:
    """Return one figure of all tokenizers, a row for each text."""
    rows = [[text, *(_formed(t["texts"][text][key], form) for t in found["tokenizers"].values())]
            for text in found["texts"]]
    return Table([title, *found["tokenizers"]], rows)


def _formed(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def model_table(found: dict[str, Any]) -> Table:
    """Return what each tokenizer is and what it asks of a model."""
    rows = [[name, t["library"], f"{t['vocab_size']:,}", f"{t['embedding_params'] / 1e6:,.1f} M",
             f"{t['head_share_of_flops']:.1%}", f"{t['mb_per_cpu_s']:.2f}"]
            for name, t in found["tokenizers"].items()]
    return Table(["tokenizer", "library", "ids", "embedding and head", "FLOPs in head", "MB per CPU s"], rows)


def overlap_table(found: dict[str, Any]) -> Table:
    """Return what share of the row's tokens the column's tokenizer has."""
    names = list(found["tokenizers"])
    rows = [[a, *("–" if a == b else f"{found['overlap'][a][b]['num_shared']:,} "
                                     f"({found['overlap'][a][b]['share_of_first']:.1%})"
                  for b in names)] for a in names]
    return Table(["of these tokens", *(f"are in {name}" for name in names)], rows)


def _cut_tables(found: dict[str, Any]) -> list[Table]:
    names = list(found["tokenizers"])
    tables = []
    for text in found["texts"]:
        words, lines = found["cut_differently"][text]["words"], found["cut_differently"][text]["lines"]
        if words:
            tables.append(Table([f"{text}: word", "times", *names],
                                [[w["text"], f"{w['count']:,}", *w["cuts"]] for w in words]))
        if lines:
            rows = [[*(f"{n}: {c}" for n, c in zip(line["num_tokens"], line["cuts"], strict=True))]
                    for line in lines]
            tables.append(
                Table([f"{text}: line by {name}" if i == 0 else name for i, name in enumerate(names)], rows))
    return tables
