"""Declare and run `sov-tokenizer compare`: cost, shared vocabulary and speed of tokenizers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from megatron_sov.base.artifacts import format_json, write_output
from megatron_sov.base.errors import Fix, UserError, stop_check
from megatron_sov.base.figures import NO_VALUE, align_columns
from megatron_sov.base.hints.kinds import DATA_SUFFIXES
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import AboveZero, AtLeastOne, DeclaredCommand, Flag
from tokenizer.formats.reader import LoadedTokenizer, open_tokenizer
from tokenizer.report.measures import (
    HeldoutTextOptions, NamedText, TokenizerMeasures, TokenizerPath, measure_text, read_texts)

SPEED_BYTES = 1_000_000
"""Text for `measure_speeds`, over all --text together."""
SPEED_ROUNDS = 2
DEFAULT_HIDDEN_SIZE, DEFAULT_BODY_PARAMS = 4096, 8e9
TABLES = {"bytes per token": "bytes_per_token", "tokens per word": "tokens_per_word",
          "tokens against the first": "relative_tokens", "FLOPs against the first": "relative_flops"}
"""Title -> figure of a text."""


@dataclass(frozen=True, kw_only=True)
class TokenizerCompareOptions(HeldoutTextOptions):
    """Compare tokenizers on the same held-out text: bytes per token, tokens per word, cost in context and in
    FLOPs, shared vocabulary, and speed. Ratios are relative to the first tokenizer."""

    tokenizers: tuple[TokenizerPath, ...]
    hidden_size: AtLeastOne = DEFAULT_HIDDEN_SIZE
    """The model's embedding width."""
    body_params: Annotated[AboveZero, Flag(value="N")] = DEFAULT_BODY_PARAMS
    """Active parameters per token, without embedding and head."""
    json: Annotated[Path | None, Flag(value="FILE")] = None
    """Write all numbers to a JSON file."""


def run_compare(args: TokenizerCompareOptions) -> None:
    """Compare tokenizers, print tables and write the JSON file. Raises `UserError`: fewer than two
    tokenizers, no text, an unreadable input, or an unwritable output."""
    if len(args.tokenizers) < 2:
        raise UserError(f"{args.tokenizers[0]}: is the only tokenizer; name a second tokenizer",
                        Fix(arguments=("DIR",)))
    if not args.text:
        files = [str(path) for path in args.tokenizers if path.suffix in DATA_SUFFIXES]
        options = [word for text in files or ["en=FILE"] for word in ("--text", text)]
        raise UserError("--text is missing; name held-out text to compare on, e.g. --text ko=ko.jsonl",
                        Fix(left_out=tuple(files), options=tuple(options)))
    check_output("--json", args.json)
    comparison = compare_tokenizers(args.tokenizers, read_texts(args.text, args.max_text_mb),
                                    args.hidden_size, args.body_params)
    tokenizers = comparison["tokenizers"]
    for title, key in TABLES.items():
        rows = []
        for text in comparison["texts"]:
            values = [facts["texts"][text][key] for facts in tokenizers.values()]
            rows.append([text, *map(_format_value, values)])
        print(f"{title}\n{align_columns([['text', *tokenizers], *rows], left=(0,))}")
    rows = [[name, *(f"{share:.1%}" for share in facts["shared_with"].values())]
            for name, facts in tokenizers.items()]
    head = ["of these tokens", *(f"are in {name}" for name in tokenizers)]
    print(f"shared vocabulary\n{align_columns([head, *rows], left=(0,))}")
    for name, facts in tokenizers.items():
        print(f"{name}: {facts['vocab_size']:,} ids, {facts['mb_per_cpu_s']:.2f} MB per CPU second")
    if args.json is not None:
        write_output(args.json, format_json(comparison))


def compare_tokenizers(paths: Sequence[Path], texts: list[NamedText], hidden_size: int,
                       body_params: float) -> dict[str, Any]:
    """Return all measurements as JSON values for `format_json`."""
    loaded = [open_tokenizer(path) for path in paths]
    stop_check()
    names = choose_names(loaded)
    measured = [[measure_text(tokenizer, text) for text in texts]
                for tokenizer in tqdm(loaded, "encoding", disable=None)]
    # FLOPs per token grow with the active parameters, including the head (arXiv 2001.08361)
    params = [body_params + tokenizer.vocab_size * hidden_size for tokenizer in loaded]
    tokenizers = {}
    for number, (name, tokenizer, speed) in enumerate(zip(names, loaded, measure_speeds(loaded, texts),
                                                          strict=True)):
        tokenizers[name] = {
            "path": str(tokenizer.path), "library": tokenizer.library, "vocab_size": tokenizer.vocab_size,
            "mb_per_cpu_s": speed,
            "shared_with": {second_name: measure_shared_part(tokenizer, second)
                            for second_name, second in zip(names, loaded, strict=True)},
            "texts": compute_costs(measured[number], measured[0], params[number] / params[0])}
    return {"hidden_size": hidden_size, "body_params": body_params, "texts": [text.name for text in texts],
            "tokenizers": tokenizers}


def choose_names(tokenizers: list[LoadedTokenizer]) -> list[str]:
    """Return folder or file names; the whole path if two names are equal."""
    names = [t.name for t in tokenizers]
    return [name if names.count(name) == 1 else str(t.path)
            for name, t in zip(names, tokenizers, strict=True)]


def compute_costs(measured: list[TokenizerMeasures], first: list[TokenizerMeasures], token_cost: float
                  ) -> dict[str, dict[str, Any]]:
    """Return text name -> measurements and costs relative to the first tokenizer.

    `relative_tokens` is the cost in context, KV cache and generation steps; `relative_flops` multiplies by
    `token_cost`, the relative FLOPs of a token, which grow with the head.
    """
    costs = {}
    for measures, reference in zip(measured, first, strict=True):
        relative = measures.num_tokens / max(1, reference.num_tokens)
        costs[measures.text.name] = measures.get_numbers() | {
            "relative_tokens": relative, "relative_flops": relative * token_cost}
    return costs


def measure_shared_part(tokenizer: LoadedTokenizer, second: LoadedTokenizer) -> float:
    """Return the share of tokens whose bytes are a token of `second`, without special and added tokens."""
    tokens = set(tokenizer.tokens.values())
    return len(tokens & set(second.tokens.values())) / max(1, len(tokens))


def measure_speeds(tokenizers: list[LoadedTokenizer], texts: list[NamedText]) -> list[float]:
    """Return MB per CPU second by tokenizer, the best in `SPEED_ROUNDS` rounds."""
    chunks = [chunk for text in texts for chunk in text.sample_chunks(SPEED_BYTES // len(texts))]
    num_bytes = sum(len(chunk.encode()) for chunk in chunks)
    best_s = [float("inf")] * len(tokenizers)
    for _ in range(SPEED_ROUNDS):
        for i, tokenizer in enumerate(tokenizers):
            started_s = time.process_time()
            for chunk in chunks:
                tokenizer.encode(chunk)
            best_s[i] = min(best_s[i], time.process_time() - started_s)
    return [num_bytes / 1e6 / max(s, 1e-9) for s in best_s]


def _format_value(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.3f}"


COMPARE = DeclaredCommand(TokenizerCompareOptions, run_compare)
