"""Resolve the target of `eval lm`: model, tokenizer, engine and content hash."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import (
    MANIFEST, FileRecord, find_damaged_files, manifest_sha256, read_manifest)
from megatron_sov.base.digests import hash_file
from megatron_sov.base.errors import UserError, format_problems
from megatron_sov.bench.lm.engine_runs import AnswerEngine
from megatron_sov.bench.lm.results import EvaluatedModel
from megatron_sov.bench.lm.settings import LmEvalSettings
from megatron_sov.chat.folder import TOKENIZER_JSON, read_chat_encoder
from megatron_sov.chat.marks import build_text_decoder
from megatron_sov.engine.parallel.device import choose_inference_precision
from megatron_sov.infer.engine import MEGATRON, TRANSFORMERS
from megatron_sov.infer.engines.load import load_tokenizer
from megatron_sov.infer.engines.target import Target, find_target
from megatron_sov.infer.prompts import check_engine, read_stop_ids
from megatron_sov.infer.request import Batching
from megatron_sov.runs.checkpoints import check_model_path
from megatron_sov.work.endpoints.transport import is_url

UNKNOWN_LENGTH = 2048
"""Context length in tokens for a folder without one, as in lm-eval."""


@dataclass(frozen=True)
class Subject:
    model: EvaluatedModel
    identity: dict[str, Any]
    """Values that determine answers in addition to the request; see `get_answer_folder`."""
    tokenizer: Any
    """Tokenizer from transformers."""
    max_length: int
    """Context length in tokens."""
    engine: AnswerEngine


def resolve_subject(path: str, settings: LmEvalSettings, with_hash: bool = True) -> Subject:
    """Resolve a target as typed; `with_hash` computes the content hash, which may read every weight file.

    Raises:
        UserError: no model at `path`, or settings that the model does not support.
    """
    if is_url(path):
        raise UserError(f"{path}: `eval lm` runs checkpoints and Hugging Face folders; evaluate an endpoint "
                        "with lm-eval's own command: lm_eval --model local-chat-completions --model_args "
                        "base_url=URL,model=NAME")
    check_model_path(Path(path))
    target = find_target(Path(path))
    has_layout = bool(settings.settings) or settings.nproc is not None
    engine = settings.engine or (TRANSFORMERS if target.is_hf and not has_layout else MEGATRON)
    check_engine(engine, target, settings.settings, settings.nproc)
    folder = target.tokenizer_folder
    tokenizer = load_tokenizer(folder)
    encoder = read_chat_encoder(folder) if settings.chat_template else None
    if settings.chat_template and (encoder is None or not tokenizer.chat_template):
        raise UserError(f"--apply-chat-template: {folder} has no chat template; leave the option out, or add "
                        "the chat template from training")
    max_length = settings.max_length_tokens or target.max_tokens
    max_length = UNKNOWN_LENGTH if math.isinf(max_length) else int(max_length)
    if max_length > target.max_tokens:
        raise UserError(f"--max-length {max_length}: the model ends at {target.max_tokens}; choose less")
    digest = hash_model(target) if with_hash else ""
    model = EvaluatedModel(str(target.path), digest, "huggingface" if target.is_hf else "checkpoint",
                           target.step, str(settings.run) if settings.run else None)
    end_ids = read_stop_ids(target, tokenizer.eos_token_id, encoder)
    special_ids = {str(token.content): int(number) for number, token in tokenizer.added_tokens_decoder.items()
                   if token.special}
    decode = build_text_decoder(folder / TOKENIZER_JSON, end_ids,
                                lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)))
    # layouts agree up to rounding and share answers
    numeric_settings = sorted(setting for setting in settings.settings if not setting.startswith("parallel."))
    identity = {"model": digest, "engine": engine, "settings": numeric_settings, "ends": list(end_ids),
                "precision": choose_inference_precision()}
    answer_engine = AnswerEngine(target, engine, tuple(settings.settings), settings.nproc,
                                 Batching(settings.batch_size), end_ids, special_ids, decode)
    return Subject(model, identity, tokenizer, max_length, answer_engine)


def hash_model(target: Target) -> str:
    """Hash a model's content: the hash of its manifest, or without a manifest of every file.

    Raises:
        UserError: a file differs from the manifest. Weight files with size and time as written are not read.
    """
    folder = target.path
    if (folder / MANIFEST).is_file():
        written_ns = (folder / MANIFEST).stat().st_mtime_ns  # the manifest is written last
        checked = [name for name, record in read_manifest(folder).files.items()
                   if not name.endswith(".safetensors") or _may_differ(folder / name, record, written_ns)]
        if damaged := find_damaged_files(folder, checked):
            raise UserError(format_problems(str(folder), damaged, "restore it from a copy"))
        return manifest_sha256(folder)
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        digest.update(f"{file.name} {hash_file(file)}\n".encode())
    return digest.hexdigest()


def _may_differ(file: Path, record: FileRecord, written_ns: int) -> bool:
    """Return whether a file is missing, has another size, or is younger than its manifest, as after another
    save into the folder."""
    try:
        status = file.stat()
    except OSError:
        return True
    return status.st_size != record.size_bytes or status.st_mtime_ns > written_ns
