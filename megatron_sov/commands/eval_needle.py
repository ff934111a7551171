"""`megatron-sov eval needle TARGET [--data DIR ...] [--text LANGUAGE=FILE ...]`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from megatron_sov.config import Language, NeedleConfig, NeedleKind, data_paths
from megatron_sov.errors import UserError

if TYPE_CHECKING:
    from megatron_sov.eval.needle.suite import NeedleSuite
    from megatron_sov.generate.target import Target

LANGUAGES: tuple[Language, ...] = get_args(Language)


def add_needle_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the suite can be told; what is left out comes from the run's settings."""
    parser.add_argument("--data", action="append", default=[], metavar="DIR",
                        help="token shards with held-out documents")
    parser.add_argument("--text", action="append", default=[], metavar="LANGUAGE=FILE",
                        help=f"a text file that needles are hidden in; languages: {', '.join(LANGUAGES)}")
    parser.add_argument("--language", action="append", default=[], metavar="SOURCE=LANGUAGE",
                        help="a source's language, where its text does not show it")
    parser.add_argument("--kinds", nargs="+", choices=get_args(NeedleKind),
                        help="what is asked (default: the setting)")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES,
                        help="languages of the text (default: all that there is)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N",
                        help="context lengths in tokens (default: the setting)")
    parser.add_argument("--depths", type=float, nargs="+", metavar="D",
                        help="places of the first needle, 0 = start, 1 = end")
    parser.add_argument("--samples", type=int, metavar="N", help="examples of a cell (default: the setting)")
    parser.add_argument("--distractor-share", type=float, metavar="S",
                        help="part of each context that needles with other keys fill (default: the setting)")
    parser.add_argument("--by", choices=("generation", "likelihood"), default="generation",
                        help="greedy decoding, or the most probable of all words (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of keys, values and text (default 0)")


def suite_of(args: argparse.Namespace, target: Target) -> NeedleSuite:
    """Return the suite that the arguments and the target's settings describe.

    Raises:
        UserError: there is no text, it does not fit the model, or the numbers make no test.
    """
    from megatron_sov.data.token_shards import open_sources, tokenizer_folder
    from megatron_sov.data.vocabulary import refuse_other_tokens
    from megatron_sov.eval.needle.haystack import open_haystacks
    from megatron_sov.eval.needle.suite import make_suite

    if not args.data and not args.text:
        raise UserError("there is no text to hide needles in: pass --data DIR or --text LANGUAGE=FILE")
    sources = open_sources(data_paths(args.data), target.vocab_size or sys.maxsize) if args.data else []
    refuse_other_tokens(tokenizer_folder(sources), target.tokenizer_folder)
    config = _config(args, target.config.needle if target.config else NeedleConfig())
    told = {name: language for language, name in (_named(word, "--language", True) for word in args.language)}
    files = [(language, Path(name))
             for language, name in (_named(word, "--text", False) for word in args.text)]
    haystacks = open_haystacks(sources, "heldout", target.tokenizer_folder, languages=config.languages,
                               told=told, files=files)
    return make_suite(config, haystacks, seed=args.seed, by=args.by)


def _config(args: argparse.Namespace, defaults: NeedleConfig) -> NeedleConfig:
    given = {"kinds": args.kinds, "languages": args.languages, "lengths_tokens": args.lengths,
             "depths": args.depths}
    found = {name: tuple(values) for name, values in given.items() if values}
    numbers = {"samples": args.samples, "distractor_share": args.distractor_share}
    return dataclasses.replace(defaults, **found,  # type: ignore[arg-type]
                               **{k: v for k, v in numbers.items() if v is not None})


def _named(word: str, option: str, language_last: bool) -> tuple[Language, str]:
    """Return language and name of LANGUAGE=NAME or NAME=LANGUAGE."""
    name, found, language = word.rpartition("=") if language_last else word.partition("=")[::-1]
    if not found or language not in LANGUAGES or not name:
        form = "SOURCE=LANGUAGE" if language_last else "LANGUAGE=FILE"
        raise UserError(f"{option} {word}: must be {form}; languages are {', '.join(LANGUAGES)}")
    return next(known for known in LANGUAGES if known == language), name
