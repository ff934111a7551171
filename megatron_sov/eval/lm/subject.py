"""The model that is evaluated: a checkpoint, a Hugging Face folder, or an endpoint, and how it reads text."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.artifacts import MANIFEST, FileRecord, damaged_files, manifest_sha256, read_manifest
from megatron_sov.chat.folder import TOKENIZER_JSON
from megatron_sov.chat.marks import text_decoder
from megatron_sov.digests import file_digest
from megatron_sov.errors import UserError, list_problems
from megatron_sov.eval.lm.bridge import Reading
from megatron_sov.eval.lm.local import Running
from megatron_sov.eval.lm.results import EvaluatedModel
from megatron_sov.eval.lm.settings import Settings
from megatron_sov.generate.asking import check_engine, generation_ends
from megatron_sov.generate.engine import MEGATRON, TRANSFORMERS
from megatron_sov.generate.request import Batching
from megatron_sov.generate.target import Target, find_target
from megatron_sov.runs.checkpoints import refuse_missing

UNKNOWN_LENGTH = 2048
"""Longest sequence where a folder says none, as in lm-eval."""


@dataclass(frozen=True)
class Subject:
    """A model and how it is asked."""

    model: EvaluatedModel
    """What the results say of it."""
    identity: dict[str, Any]
    """On what its answers depend beside the requests."""
    reading: Reading
    """How it reads text."""
    running: Running | None
    """How it is run; None: an endpoint."""


def is_endpoint(target: str) -> bool:
    return target.startswith(("http://", "https://"))


def subject_of(target: str, settings: Settings, whole: bool = True) -> Subject:
    """Return the model that a target means.

    Args:
        target: a path, or an address.
        settings: of the evaluation.
        whole: whether its hash is wanted, which may take a while.

    Raises:
        UserError: there is no such model, or it cannot be asked like this.
    """
    if is_endpoint(target):
        return _endpoint(target, settings)
    refuse_missing(Path(target))
    found = find_target(Path(target))
    engine = settings.engine or (TRANSFORMERS if found.is_hf and not settings.settings
                                 and settings.nproc is None else MEGATRON)
    check_engine(engine, found, settings.settings, settings.nproc)
    tokenizer, ends, special = _tokens(found, settings.chat_template)
    max_length = settings.max_length_tokens or found.max_tokens
    max_length = UNKNOWN_LENGTH if math.isinf(max_length) else int(max_length)
    if max_length > found.max_tokens:
        raise UserError(f"--max-length {max_length}: the model ends at {found.max_tokens}; choose less")
    digest = content_hash(found) if whole else ""
    model = EvaluatedModel(str(found.path), digest, "huggingface" if found.is_hf else "checkpoint",
                           found.step, str(settings.run) if settings.run else None)
    # layouts agree up to rounding, so that answers are shared among them
    how = sorted(setting for setting in settings.settings if not setting.startswith("parallel."))
    reading = Reading(tokenizer, max_length, settings.chat_template, False, settings.max_gen_tokens,
                      settings.seed)

    decode = text_decoder(found.tokenizer_folder / TOKENIZER_JSON, ends,
                          lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)))
    running = Running(found, engine, tuple(settings.settings), settings.nproc, Batching(settings.batch_size),
                      ends, special, decode)
    return Subject(model, {"model": digest, "engine": engine, "settings": how, "ends": list(ends)}, reading,
                   running)


def _tokens(target: Target, chat: bool) -> tuple[Any, tuple[int, ...], dict[str, int]]:
    """Return a model's tokenizer, the tokens that end its answers, and its special tokens by their text."""
    from megatron_sov.chat.folder import read_chat_encoder
    from megatron_sov.generate.load import load_tokenizer

    folder = target.tokenizer_folder
    tokenizer = load_tokenizer(folder)
    ends = {int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set()
    ends |= generation_ends(target)
    if chat:
        encoder = read_chat_encoder(folder)
        if encoder is None or not tokenizer.chat_template:
            raise UserError(f"--apply-chat-template: {folder} has no chat template; leave it out, or put the "
                            "chat template there that the model was trained with")
        ends |= set(encoder.end_ids())
    special = {str(token.content): int(number) for number, token in tokenizer.added_tokens_decoder.items()
               if token.special}
    return tokenizer, tuple(sorted(ends)), special


def content_hash(target: Target) -> str:
    """Return the hash of a model's content: its manifest's, else of all its files.

    Raises:
        UserError: a file differs from its manifest; of large ones that were not written since, only the
            size is looked at.
    """
    folder = target.path
    if (folder / MANIFEST).is_file():
        written_ns = (folder / MANIFEST).stat().st_mtime_ns  # behind all files
        looked_at = [name for name, record in read_manifest(folder).files.items()
                     if not name.endswith(".safetensors") or _may_differ(folder / name, record, written_ns)]
        if damaged := damaged_files(folder, looked_at):
            raise UserError(list_problems(str(folder), damaged, "restore it from a copy"))
        return manifest_sha256(folder)
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        digest.update(f"{file.name} {file_digest(file)}\n".encode())
    return digest.hexdigest()


def _may_differ(file: Path, record: FileRecord, written_ns: int) -> bool:
    """Return whether a file is missing, of another size, or younger than its manifest: then another model may
    have been saved over it."""
    try:
        found = file.stat()
    except OSError:
        return True
    return found.st_size != record.size_bytes or found.st_mtime_ns > written_ns


def _endpoint(url: str, settings: Settings) -> Subject:
    endpoint = settings.endpoint
    if "@" in url or "?" in url or "#" in url:  # it is written into the results, and may hold a key
        raise UserError("TARGET: an endpoint's address must be one alone, without user, password or query; "
                        f"put the key into the variable {endpoint.key_env} (--key-env)")
    given = [*(f"--set {s}" for s in settings.settings),
             *([f"--nproc {settings.nproc}"] if settings.nproc is not None else []),
             *([f"--engine {settings.engine}"] if settings.engine else [])]
    problems = []
    if not endpoint.model:
        problems.append("--model: is missing; an endpoint may know several models, name one")
    if given:
        problems.append(f"{', '.join(given)}: an endpoint runs its model itself; leave it out")
    if problems:
        raise UserError(list_problems(url, problems) if len(problems) > 1 else f"{url}: {problems[0]}")
    tokenizer = None
    if endpoint.tokenizer is not None:
        if settings.max_length_tokens is None:
            raise UserError(f"{url}: --tokenizer needs --max-length N, the longest sequence that the "
                            "endpoint takes, in tokens; it does not tell")
        from megatron_sov.generate.load import load_tokenizer

        tokenizer = load_tokenizer(endpoint.tokenizer)
    digest = hashlib.sha256(json.dumps([url.rstrip("/"), endpoint.model]).encode()).hexdigest()
    reading = Reading(tokenizer, settings.max_length_tokens or UNKNOWN_LENGTH, settings.chat_template,
                      settings.chat_template and tokenizer is None, settings.max_gen_tokens, settings.seed)
    return Subject(EvaluatedModel(f"{url.rstrip('/')} {endpoint.model}", digest, "endpoint", None,
                                  str(settings.run) if settings.run else None),
                   {"model": digest}, reading, None)
