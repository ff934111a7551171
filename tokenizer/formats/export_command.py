"""`sov-tokenizer export`: a tokenizer in the form of tiktoken or sentencepiece, with the same ids."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from megatron_sov.base.artifacts import to_json, write_output
from megatron_sov.base.errors import UserError
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import Flag, add_options, read_options


@dataclass(frozen=True, kw_only=True)
class TokenizerExportOptions:
    """Write a tokenizer for tiktoken (a file of ranks; pattern and special tokens in FILE.json
    beside it) or for sentencepiece (a .model file; byte-level BPE has no such form).

    Ids are compared before anything is written, on built-in texts of all scripts and on yours."""

    path: Annotated[Path, Flag("DIR")]
    """A tokenizer's folder, ours or Hugging Face's, or its tokenizer.json."""
    format: Literal["tiktoken", "sentencepiece"]
    """Whose form."""
    output: Annotated[Path, Flag(value="FILE")]
    """The file of ranks, or the .model file."""
    text: tuple[Path, ...] = ()
    """Text on which ids are compared, beside the built-in ones."""
    overwrite: bool = False
    """Replace files that are already there."""


def run_export(typed: argparse.Namespace) -> int:
    """Run `sov-tokenizer export`; returns 0."""
    args = read_options(TokenizerExportOptions, typed)
    export_tokenizer(args.path, args.format, args.output, texts=args.text,
                     overwrite=args.overwrite)
    return 0


def export_tokenizer(path: Path, form: str, output: Path, *, texts: Sequence[Path] = (),
                     overwrite: bool = False) -> None:
    """Write a tokenizer in another form.

    Args:
        path: a folder with tokenizer.json, or the file.
        form: "tiktoken" or "sentencepiece".
        output: the file of ranks (rules are written to `output`.json) or the .model file.
        texts: files and folders on which ids are compared besides.
        overwrite: replace files that are already there.

    Raises:
        UserError: the tokenizer has no such form, or would give other ids; nothing is written then.
    """
    from tokenizer.formats.reader import find_file, open_hf
    from tokenizer.formats.tiktoken_format import rules_path
    from tokenizer.sample_texts import built_in, first_difference, users

    targets = [output, rules_path(output)] if form == "tiktoken" else [output]
    if (there := next((t for t in targets if t.exists()), None)) and (not overwrite or there.is_dir()):
        raise UserError(f"{there}: exists already; choose another file or pass --overwrite")
    for target in targets:
        check_output("--output", target)
    file = find_file(path)
    if file.suffix != ".json":
        raise UserError(f"{file}: is no tokenizer.json; take it over by `sov-tokenizer import` first")
    source = open_hf(file)
    contents, encode = (_tiktoken if form == "tiktoken" else _sentencepiece)(source, output.stem)
    samples = [*built_in(source.raw), *users(texts)]
    if difference := first_difference(samples, encode, source.encode):
        raise UserError(f"{file}: cannot be exported, since {form} would not give the same ids "
                        f"for {difference}")
    for target, content in zip(targets, contents, strict=True):
        write_output(target, content)
        print(f"wrote {target}")
    print(f"{form} gives the same ids on {sum(len(t.encode()) for t in samples) / 1e6:.2f} MB of text")


Made = tuple[list[bytes], Callable[[str], list[int]]]


def _tiktoken(source: Any, name: str) -> Made:
    """Return the contents of ranks and rules, and the encoding by them."""
    from megatron_sov.base.documents.byte_bpe import NotByteBpe
    from tokenizer.formats.tiktoken_format import encoder, encoding, ranks_text, to_tiktoken

    try:
        ranks, rules = to_tiktoken(source.raw, name, source.named)
    except NotByteBpe as e:
        raise UserError(f"{source.file}: has no form in tiktoken: {e}") from None
    found = encoding(ranks, rules)
    for token, id_ in ranks.items():
        if found.decode_single_token_bytes(id_) != token or found.encode_single_token(token) != id_:
            raise UserError(f"{source.file}: cannot be exported, since tiktoken would not keep token "
                            f"{token!r} with id {id_}")
    for special, id_ in rules.special_tokens.items():
        if found.encode(special, allowed_special="all") != [id_]:
            raise UserError(f"{source.file}: cannot be exported, since tiktoken would not find special token "
                            f"{special!r} in text")
    if rules.normalization:
        print(f"tiktoken takes text as it is: apply {rules.normalization} to it beforehand")
    return [ranks_text(ranks), to_json(rules).encode()], encoder(ranks, rules)


def _sentencepiece(source: Any, name: str) -> Made:
    """Return the content of the .model file, and the encoding by it."""
    from tokenizer.formats.sentencepiece_format import NotSentencepiece, processor, to_sentencepiece

    try:
        model = to_sentencepiece(source.raw, source.named)
    except NotSentencepiece as e:
        raise UserError(f"{source.file}: has no form in sentencepiece: {e}") from None
    return [model], processor(model).encode


EXPORT = SimpleNamespace(add_arguments=partial(add_options, cls=TokenizerExportOptions), run=run_export)
