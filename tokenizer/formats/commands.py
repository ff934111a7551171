"""Declare `sov-tokenizer import` and run `sov-tokenizer export`, which keep the ids of a tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_sov.base.artifacts import check_output_folder, format_json, write_output
from megatron_sov.base.documents.byte_bpe import NotByteBpe
from megatron_sov.base.errors import Fix, UserError, suggest_name
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import DeclaredCommand, Flag
from tokenizer.formats.hf_files import get_token_ids, translate_panics
from tokenizer.formats.reader import ForeignTokenizer, find_file, open_foreign, open_hf
from tokenizer.formats.sample_texts import find_first_difference, iter_builtin_texts, iter_user_texts
from tokenizer.formats.tiktoken_format import (
    TiktokenRules, build_encoder, build_encoding, format_ranks, get_rules_path, to_tiktoken)


@dataclass(frozen=True, kw_only=True)
class TokenizerImportOptions:
    """Convert a tokenizer of Hugging Face (a folder with tokenizer.json, or the file) or tiktoken (a file of
    ranks; pattern and special tokens in FILE.json).

    The ids are compared with the ids of the source's library, on built-in texts of all scripts and on
    --text. If they differ, no tokenizer is written."""

    path: Annotated[Path, Flag("PATH")]
    """The folder or file."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the tokenizer."""
    rules: Annotated[Path | None, Flag(value="FILE.json")] = None
    """For tiktoken: JSON file with pat_str and special_tokens (default: PATH.json)."""
    text: tuple[Path, ...] = ()
    """Text on which ids are compared, in addition to built-in texts, and bytes per token are measured."""
    overwrite: bool = False
    """Replace an existing tokenizer."""
    bos: Annotated[str | None, Flag(value="TOKEN")] = None
    """Special token at a document's start, if the source has no such token."""
    eos: Annotated[str | None, Flag(value="TOKEN")] = None
    """Special token at a document's end, if the source has no such token."""
    pad: Annotated[str | None, Flag(value="TOKEN")] = None
    """Special token for padding (default: eos), if the source has no such token."""


@dataclass(frozen=True)
class ImportRequest:
    """Checked input of `import_run.write_import`."""

    source: ForeignTokenizer
    special_tokens: dict[str, Any]
    """bos_token, eos_token and pad_token."""
    options: TokenizerImportOptions


def check_import(options: TokenizerImportOptions) -> ImportRequest:
    """Read the tokenizer. Raises `UserError`: the tokenizer cannot be read or represented, has no end token,
    or the output exists."""
    check_output_folder(options.output, "tokenizer", options.overwrite)
    source = open_foreign(options.path, options.rules)
    named = {"bos_token": options.bos, "eos_token": options.eos, "pad_token": options.pad}
    named = {name: token for name, token in named.items() if token is not None}
    return ImportRequest(source, _choose_special_tokens(source, named), options)


def _choose_special_tokens(source: ForeignTokenizer, named: dict[str, str | None]) -> dict[str, Any]:
    """Return bos_token, eos_token and pad_token; options override the source, and pad defaults to eos. Raises
    `UserError`: a name is not a token, or the end token is unknown."""
    special: dict[str, Any] = {**source.named_tokens, **named}
    ids = get_token_ids(source.raw)
    for name, token in special.items():
        if token is not None and token not in ids:
            raise UserError(f"{source.file}: {name} = {token!r} is no token{suggest_name(token, ids)}; "
                            f"pass another one by --{name.removesuffix('_token')}")
    if not special.get("eos_token"):
        tokens = [token["content"] for token in source.raw["added_tokens"]][:8]
        raise UserError(f"{source.file}: does not say which token ends a document; "
                        f"pass it by --eos (special tokens: {', '.join(tokens) or 'none'})",
                        Fix(options=("--eos", *tokens)) if len(tokens) == 1 else None)
    return {"bos_token": None, **special, "pad_token": special.get("pad_token") or special["eos_token"]}


IMPORT = DeclaredCommand(TokenizerImportOptions, check_import, "tokenizer.formats.import_run:write_import")


@dataclass(frozen=True, kw_only=True)
class TokenizerExportOptions:
    """Write a tokenizer for tiktoken: a file of ranks; pattern and special tokens in FILE.json.

    The ids are compared on built-in texts of all scripts and on --text before a file is written."""

    path: Annotated[Path, Flag("DIR")]
    """Folder with tokenizer.json, or the file."""
    output: Annotated[Path, Flag(value="FILE")]
    """The rank file."""
    format: Literal["tiktoken"] = "tiktoken"
    """Library to write for."""
    text: tuple[Path, ...] = ()
    """Text on which ids are compared, in addition to built-in texts."""
    overwrite: bool = False
    """Replace existing files."""


def run_export(args: TokenizerExportOptions) -> None:
    """Write a tokenizer for tiktoken. Raises `UserError`: tiktoken cannot express the tokenizer, or would
    give other ids; no file is written then."""
    targets = args.output, get_rules_path(args.output)
    for target in targets:
        if target.is_dir() or (target.exists() and not args.overwrite):
            raise UserError(f"{target}: exists already; choose another file or pass --overwrite")
        check_output("--output", target)
    file = find_file(args.path)
    if file.suffix != ".json":
        raise UserError(f"{file}: is no tokenizer.json; convert it with `sov-tokenizer import` first")
    source = open_hf(file)
    try:
        ranks, rules = to_tiktoken(source.raw, args.output.stem, source.named_tokens)
    except NotByteBpe as e:
        raise UserError(f"{file}: has no form in tiktoken: {e}") from None
    _check_tokens(file, ranks, rules)
    if rules.normalization:
        print(f"tiktoken does not normalize: apply {rules.normalization} to text first")
    samples = [*iter_builtin_texts(source.raw), *iter_user_texts(args.text)]
    with translate_panics(file):  # patterns that fail on some texts
        difference = find_first_difference(samples, build_encoder(ranks, rules), source.encode)
    if difference:
        raise UserError(f"{file}: cannot be exported, since tiktoken would not give the same ids "
                        f"for {difference}")
    for target, content in zip(targets, (format_ranks(ranks), format_json(rules).encode()), strict=True):
        write_output(target, content)
        print(f"wrote {target}")
    print(f"tiktoken gives the same ids on {sum(len(t.encode()) for t in samples) / 1e6:.2f} MB of text")


def _check_tokens(file: Path, ranks: dict[bytes, int], rules: TiktokenRules) -> None:
    encoding = build_encoding(ranks, rules)
    for token, id_ in ranks.items():
        if encoding.decode_single_token_bytes(id_) != token or encoding.encode_single_token(token) != id_:
            raise UserError(f"{file}: cannot be exported, since tiktoken would not keep token "
                            f"{token!r} with id {id_}")
    for special, id_ in rules.special_tokens.items():
        if encoding.encode(special, allowed_special="all") != [id_]:
            raise UserError(f"{file}: cannot be exported, since tiktoken would not find special token "
                            f"{special!r} in text")


EXPORT = DeclaredCommand(TokenizerExportOptions, run_export)
