"""What a student writes behind prompts, as token shards that its teacher reads and it learns from.

Tokens go in and tokens come out: nothing is decoded and encoded again.  Each part of the prompts is a shard;
a killed job goes on behind its last finished part, with the answers that it would have written.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.base.artifacts import FileRecord, fsync_path, read_manifest, refuse_existing
from megatron_sov.base.chat.encode import TYPE_PROMPT, TYPE_RESPONSE
from megatron_sov.base.chat.folder import read_chat_encoder
from megatron_sov.base.documents.indexed_writer import IndexedWriter
from megatron_sov.base.errors import UserError
from megatron_sov.engine.data.token_bytes import token_bytes
from megatron_sov.engine.data.token_shards import (
    Source, TokenShard, open_sources, provenance, tokenizer_folder)
from megatron_sov.engine.data.vocabulary import refuse_other_tokens
from megatron_sov.engine.data.written_sources import source_record
from megatron_sov.infer.decoder.generator import MegatronEngine
from megatron_sov.infer.engines.load import Loaded, run_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.infer.request import Sampling, StopRule
from megatron_sov.post.distillation.state_files import lengths_of
from megatron_sov.post.distillation.teacher import artifact_on_ranks, weights_digest
from megatron_sov.runs.launch_environment import is_first
from megatron_sov.work.progress.resumable_artifact import ResumableArtifact, resumable_artifact

WRITTEN_KIND = "tokens"
PART_PROMPTS = 1024
SIDECARS = {"loss": "float32", "type": "uint8"}
FILES = ("bin", "idx", *SIDECARS)


@dataclass(frozen=True)
class StudentWriting:
    """What a student writes."""

    student: Target
    prompts: dict[str, float]
    """Artifact of packed prompts -> weight, which does not matter here."""
    sampling: Sampling
    part_prompts: int = PART_PROMPTS


@dataclass(frozen=True)
class _WritingPart:
    """A run of prompts whose answers are one shard."""

    source: int
    number: int
    """Among those of its source."""
    first_document: int
    num_documents: int
    first_stream: int
    """Number of the first one's random numbers, among all prompts."""


def write_answers(asked: StudentWriting, out: Path, settings: Sequence[str], nproc: int | None, *,
                  overwrite: bool = False, redo: bool = False) -> None:
    """Have a student answer the training prompts once each, and keep its answers as conversations.

    Args:
        asked: who writes behind what.
        out: the artifact; it appears only when complete.
        settings: the student's layout and precision, ``key=value``.
        nproc: local processes; under torchrun or Slurm the environment decides.
        overwrite: replace an artifact that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: the prompts' tokens mean something else to the student, or are too long for it.
    """
    asked.sampling.check()
    if is_first():
        refuse_existing(out, WRITTEN_KIND, overwrite)
    sources = open_sources(asked.prompts, asked.student.vocab_size, ("prompt",))
    tokenizer = tokenizer_folder(sources)
    if tokenizer is None:
        raise UserError(f"{', '.join(asked.prompts)}: no tokenizer.json travels with the prompts; pack them "
                        "again")
    refuse_other_tokens(tokenizer, asked.student.tokenizer_folder)
    _refuse_too_long(asked, sources)
    parts = list(_parts(sources, asked.part_prompts))
    stop = StopRule(_end_ids(tokenizer, next(iter(asked.prompts))))

    def work(loaded: Loaded) -> int:
        engine = MegatronEngine(loaded.policy)
        opened = partial(_written_artifact, asked, sources, tokenizer, settings, out, overwrite, redo)
        with artifact_on_ranks(loaded.world, opened) as artifact:
            missing = [p for p in parts if f"{_prefix(sources, p)}.{FILES[-1]}" not in artifact.finished]
            for part in missing:
                prompts = _prompts(sources, part)
                found = engine.generate(prompts, asked.sampling, stop=stop, streams=range(
                    part.first_stream, part.first_stream + part.num_documents))
                artifact.on_main(partial(_write, _prefix(sources, part), prompts, found.continuations))
            artifact.on_main(partial(_describe, sources, parts))
            return len(missing)

    run_forward_model(asked.student, settings, nproc, work)


def _parts(sources: list[Source], part_prompts: int) -> Iterator[_WritingPart]:
    stream = 0
    for index, source in enumerate(sources):
        num_documents = len(source.shard("train").lengths)
        for number, first in enumerate(range(0, num_documents, part_prompts)):
            count = min(part_prompts, num_documents - first)
            yield _WritingPart(index, number, first, count, stream)
            stream += count


def _prefix(sources: list[Source], part: _WritingPart) -> str:
    """Return the path of a part's files in the artifact, without their endings."""
    return f"{_name(sources[part.source])}/train-{part.number:05d}"


def _name(source: Source) -> str:
    return f"{source.name}-answers"


def _prompts(sources: list[Source], part: _WritingPart) -> list[list[int]]:
    shard = sources[part.source].shard("train")
    documents = range(part.first_document, part.first_document + part.num_documents)
    return [shard.tokens(d, 0, int(shard.lengths[d])).tolist() for d in documents]


def _end_ids(tokenizer: Path, prompts: str) -> tuple[int, ...]:
    """Return the tokens that end an answer: those of the chat template, and eos."""
    encoder, eos_id = read_chat_encoder(tokenizer), read_manifest(prompts, WRITTEN_KIND).content.get("eos_id")
    return tuple(sorted({*(encoder.end_ids() if encoder else ()), *([] if eos_id is None else [eos_id])}))


def _refuse_too_long(asked: StudentWriting, sources: list[Source]) -> None:
    room = asked.student.max_tokens - asked.sampling.max_new_tokens
    for source in sources:
        longest = int(lengths_of(source, "train").max(initial=0))
        if longest > room:
            raise UserError(f"source {source.name!r}: has a prompt of {longest} tokens, and --max-new-tokens "
                            f"{asked.sampling.max_new_tokens} behind it are more than the "
                            f"{asked.student.max_tokens} that {asked.student.path} reads; ask for fewer")


@contextlib.contextmanager
def _written_artifact(asked: StudentWriting, sources: list[Source], tokenizer: Path, settings: Sequence[str],
              out: Path, overwrite: bool, redo: bool) -> Iterator[ResumableArtifact]:
    """Give the artifact under construction, with all that is no answer in it."""
    plan = {"student": weights_digest(asked.student), "sampling": asdict(asked.sampling),
            "part_prompts": asked.part_prompts,
            "prompts": [i["manifest_sha256"] for i in provenance(sources)],
            "settings": [s for s in settings if not s.startswith("parallel.")]}
    with resumable_artifact(out, WRITTEN_KIND, "megatron-sov distill write", plan, overwrite=overwrite,
                            redo=redo) as artifact:
        shutil.copytree(tokenizer, artifact.path / "tokenizer", dirs_exist_ok=True)
        artifact.writer.settings = plan | {"student_path": str(asked.student.path)}
        artifact.writer.content = dict(read_manifest(next(iter(asked.prompts)), WRITTEN_KIND).content)
        artifact.writer.inputs += provenance(sources)
        yield artifact


def _write(prefix: str, prompts: list[list[int]], answers: list[list[int]], artifact: ResumableArtifact
           ) -> None:
    """Write the shard of a part; its last file makes it a finished one."""
    dtype = artifact.writer.content["dtype"]
    counts = np.array([(len(p), len(a)) for p, a in zip(prompts, answers, strict=True)])
    is_answer = np.repeat(np.tile([False, True], len(prompts)), counts.ravel())
    with IndexedWriter(artifact.path / prefix, dtype, SIDECARS) as writer:
        writer.write(counts.sum(1).astype(np.int32), {
            "bin": np.array([t for p, a in zip(prompts, answers, strict=True) for t in (*p, *a)], np.int64),
            "loss": is_answer.astype(np.float32), "type": np.where(is_answer, TYPE_RESPONSE, TYPE_PROMPT)})
    for ending in FILES:
        file = artifact.path / f"{prefix}.{ending}"
        fsync_path(file)
        artifact.finish(f"{prefix}.{ending}", FileRecord.of(file))


def _describe(sources: list[Source], parts: list[_WritingPart], artifact: ResumableArtifact) -> None:
    """Say in the manifest what the shards hold."""
    content = artifact.writer.content
    sizes_bytes = token_bytes(artifact.path / "tokenizer", content["vocab_size"])
    records = []
    for index, source in enumerate(sources):
        shards: list[dict[str, Any]] = []
        for part in (p for p in parts if p.source == index):
            prefix = _prefix(sources, part)
            shard = TokenShard(artifact.path / prefix, content["vocab_size"])
            num_tokens = int(shard.lengths.sum(dtype=np.int64))
            ids = np.fromfile(artifact.path / f"{prefix}.bin", shard.dtype)
            shards.append({"prefix": prefix, "num_documents": len(shard.lengths), "num_tokens": num_tokens,
                           "num_bytes": int(sizes_bytes[ids].sum())})
        records.append(source_record(_name(source), "chat", SIDECARS, shards))
    # an answer ends where the student ended it
    artifact.writer.content = content | {"sources": records, "eod": "none"}
