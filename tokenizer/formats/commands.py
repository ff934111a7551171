"""`sov-tokenizer import` and `export`: a tokenizer of Hugging Face, tiktoken or sentencepiece becomes one of
ours, or one of ours theirs, with the same ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_sov.base.artifacts import check_output_folder, format_json, write_output
from megatron_sov.base.documents.byte_bpe import NotByteBpe
from megatron_sov.base.errors import UserError, suggest_name
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import DeclaredCommand, Flag
from tokenizer.formats.reader import ForeignTokenizer, find_file, get_token_ids, open_foreign, open_hf
from tokenizer.formats.sample_texts import find_first_difference, iter_builtin_texts, iter_user_texts
from tokenizer.formats.sentencepiece_format import NotSentencepiece, create_processor, to_sentencepiece
from tokenizer.formats.tiktoken_format import (
    build_encoder, build_encoding, format_ranks, get_rules_path, to_tiktoken)


@dataclass(frozen=True, kw_only=True)
class TokenizerImportOptions:
    """Take over a tokenizer of Hugging Face (a folder with tokenizer.json, or the file), tiktoken (a file of
    ranks; pattern and special tokens in FILE.json) or sentencepiece (a .model file, BPE or unigram).

    What is written gives the same ids as the library that the tokenizer was made for, on built-in texts
    of all scripts and on yours. If it does not, nothing is written."""

    path: Annotated[Path, Flag("PATH")]
    """The folder or file."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the tokenizer."""
    rules: Annotated[Path | None, Flag(value="FILE.json")] = None
    """For tiktoken: pat_str and special_tokens, if they do not stand in PATH.json."""
    text: tuple[Path, ...] = ()
    """Text on which ids are compared, beside the built-in ones; bytes per token are measured on it."""
    overwrite: bool = False
    """Replace a tokenizer that is already there."""
    bos: Annotated[str | None, Flag(value="TOKEN")] = None
    """Special token for the begin of a document, if the source names none."""
    eos: Annotated[str | None, Flag(value="TOKEN")] = None
    """Special token for the end of a document, if the source names none."""
    pad: Annotated[str | None, Flag(value="TOKEN")] = None
    """Special token for padding (default: eos), if the source names none."""


@dataclass(frozen=True)
class ImportRequest:
    """Checked input for `import_run.write_import`."""

    source: ForeignTokenizer
    special_tokens: dict[str, Any]
    """bos_token, eos_token and pad_token."""
    options: TokenizerImportOptions


def check_import(options: TokenizerImportOptions) -> ImportRequest:
    """Read the tokenizer.

    Raises:
        UserError: it cannot be read or represented, no end of a document is named, or the output exists.
    """
    check_output_folder(options.output, "tokenizer", options.overwrite)
    source = open_foreign(options.path, options.rules)
    typed = {"bos_token": options.bos, "eos_token": options.eos, "pad_token": options.pad}
    special = _choose_special_tokens(source, {name: token for name, token in typed.items()
                                              if token is not None})
    return ImportRequest(source, special, options)


def _choose_special_tokens(source: ForeignTokenizer, named: dict[str, str]) -> dict[str, Any]:
    """Return bos_token, eos_token and pad_token; pad is eos where there is none.

    Raises:
        UserError: one is no token, or nothing says how documents end.
    """
    special: dict[str, Any] = {**source.named, **named}
    ids = get_token_ids(source.raw)
    for name, token in special.items():
        if token is not None and token not in ids:
            raise UserError(f"{source.file}: {name} = {token!r} is no token of it{suggest_name(token, ids)}; "
                            f"pass another one by --{name.removesuffix('_token')}")
    if not special.get("eos_token"):
        known = [t["content"] for t in source.raw["added_tokens"]][:8]
        raise UserError(f"{source.file}: does not say which token ends a document; "
                        f"pass it by --eos (special tokens: {', '.join(known) or 'none'})")
    return {"bos_token": None, **special, "pad_token": special.get("pad_token") or special["eos_token"]}


IMPORT = DeclaredCommand(TokenizerImportOptions, check_import, "tokenizer.formats.import_run:write_import")


@dataclass(frozen=True, kw_only=True)
class TokenizerExportOptions:
    """Write a tokenizer for tiktoken (a file of ranks; pattern and special tokens in FILE.json) or for
    sentencepiece (a .model file; byte-level BPE has no such form).

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


def run_export(args: TokenizerExportOptions) -> int:
    export_tokenizer(args.path, args.format, args.output, texts=args.text, overwrite=args.overwrite)
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
    targets = [output, get_rules_path(output)] if form == "tiktoken" else [output]
    if (there := next((t for t in targets if t.exists()), None)) and (not overwrite or there.is_dir()):
        raise UserError(f"{there}: exists already; choose another file or pass --overwrite")
    for target in targets:
        check_output("--output", target)
    file = find_file(path)
    if file.suffix != ".json":
        raise UserError(f"{file}: is no tokenizer.json; take it over by `sov-tokenizer import` first")
    source = open_hf(file)
    contents, encode = (_build_tiktoken_files if form == "tiktoken" else _build_sentencepiece_file)(source,
                                                                                                    output.stem)
    samples = [*iter_builtin_texts(source.raw), *iter_user_texts(texts)]
    if difference := find_first_difference(samples, encode, source.encode):
        raise UserError(f"{file}: cannot be exported, since {form} would not give the same ids "
                        f"for {difference}")
    for target, content in zip(targets, contents, strict=True):
        write_output(target, content)
        print(f"wrote {target}")
    print(f"{form} gives the same ids on {sum(len(t.encode()) for t in samples) / 1e6:.2f} MB of text")


ExportedFiles = tuple[list[bytes], Callable[[str], list[int]]]


def _build_tiktoken_files(source: ForeignTokenizer, name: str) -> ExportedFiles:
    """Return the contents of ranks and rules, and the encoding by them."""
    try:
        ranks, rules = to_tiktoken(source.raw, name, source.named)
    except NotByteBpe as e:
        raise UserError(f"{source.file}: has no form in tiktoken: {e}") from None
    found = build_encoding(ranks, rules)
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
    return [format_ranks(ranks), format_json(rules).encode()], build_encoder(ranks, rules)


def _build_sentencepiece_file(source: ForeignTokenizer, name: str) -> ExportedFiles:
    """Return the content of the .model file, and the encoding by it."""
    try:
        model = to_sentencepiece(source.raw, source.named)
    except NotSentencepiece as e:
        raise UserError(f"{source.file}: has no form in sentencepiece: {e}") from None
    return [model], create_processor(model).encode


EXPORT = DeclaredCommand(TokenizerExportOptions, run_export)
