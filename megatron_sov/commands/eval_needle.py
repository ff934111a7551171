"""`megatron-sov eval needle TARGET [--data DIR ...] [--text LANGUAGE=FILE ...]`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from megatron_sov.config import Language, NeedleConfig, NeedleKind, data_paths
from megatron_sov.errors import UserError
from megatron_sov.settings import Flag

if TYPE_CHECKING:
    from megatron_sov.eval.needle.suite import NeedleSuite
    from megatron_sov.generate.target import Target

LANGUAGES: tuple[Language, ...] = get_args(Language)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleSuiteOptions:
    """What the suite can be told; what is left out comes from the run's settings."""

    data: Annotated[tuple[str, ...], Flag(value="DIR")] = ()
    """Token shards with held-out documents."""
    text: Annotated[tuple[str, ...], Flag(value="LANGUAGE=FILE")] = ()
    """A text file that needles are hidden in; languages: english, korean, thai, code."""
    language: Annotated[tuple[str, ...], Flag(value="SOURCE=LANGUAGE")] = ()
    """A source's language, where its text does not show it."""
    kinds: Annotated[tuple[NeedleKind, ...], Flag(many=True)] = ()
    """What is asked (default: the setting)."""
    languages: Annotated[tuple[Language, ...], Flag(many=True)] = ()
    """Languages of the text (default: all that there is)."""
    lengths: Annotated[tuple[int, ...], Flag(many=True)] = ()
    """Context lengths in tokens (default: the setting)."""
    depths: Annotated[tuple[float, ...], Flag(value="D", many=True)] = ()
    """Places of the first needle, 0 = start, 1 = end."""
    samples: int | None = None
    """Examples of a cell (default: the setting)."""
    distractor_share: Annotated[float | None, Flag(value="S")] = None
    """Part of each context that needles with other keys fill (default: the setting)."""
    by: Literal["generation", "likelihood"] = "generation"
    """Greedy decoding, or the most probable of all words."""
    seed: int = 0
    """Of keys, values and text (default 0)."""


def suite_of(args: NeedleSuiteOptions, target: Target) -> NeedleSuite:
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


def _config(args: NeedleSuiteOptions, defaults: NeedleConfig) -> NeedleConfig:
    given: dict[str, Any] = {"kinds": args.kinds, "languages": args.languages, "lengths_tokens": args.lengths,
                             "depths": args.depths, "samples": args.samples,
                             "distractor_share": args.distractor_share}
    return dataclasses.replace(defaults, **{k: v for k, v in given.items() if v not in (None, ())})


def _named(word: str, option: str, language_last: bool) -> tuple[Language, str]:
    """Return language and name of LANGUAGE=NAME or NAME=LANGUAGE."""
    name, found, language = word.rpartition("=") if language_last else word.partition("=")[::-1]
    if not found or language not in LANGUAGES or not name:
        form = "SOURCE=LANGUAGE" if language_last else "LANGUAGE=FILE"
        raise UserError(f"{option} {word}: must be {form}; languages are {', '.join(LANGUAGES)}")
    return next(known for known in LANGUAGES if known == language), name
