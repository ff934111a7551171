"""The job `distill states`: a teacher reads packed documents and writes its final hidden states, or its most
probable tokens (state_files.py).

Megatron-Core has one set of process groups per process, so a teacher and a student with different layouts
communicate by files. A killed job continues after the last finished part.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_sov import convert
from megatron_sov.base.artifacts import (
    FileRecord, check_output_folder, create_file, format_json, read_manifest)
from megatron_sov.base.digests import BLAKE3, Digest, hash_file
from megatron_sov.base.errors import UserError
from megatron_sov.chat.vocabulary import check_same_tokens
from megatron_sov.engine.decode.forward_only import DocumentBatch, ForwardModel
from megatron_sov.engine.model.language_model import prepare_head_input
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.engine.parallel import collectives, context
from megatron_sov.engine.parallel.device import get_local_device, release_gpu_memory
from megatron_sov.engine.parallel.world import run_on_main
from megatron_sov.eval.heldout_loss import ROW_TOKENS, group_into_rows
from megatron_sov.infer.engines.load import LoadedModel, run_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.post.distillation.state_files import (
    DTYPES, HEAD, HEAD_WEIGHT, KIND, StateFormat, StatesPart, build_content, pack_rows, plan_parts,
    read_lengths)
from megatron_sov.runs.checkpoints import ADAPTER, CHECKPOINT_KIND as CHECKPOINT, MODEL, read_adapter_base
from megatron_sov.runs.launch_environment import is_first_rank, num_ranks
from megatron_sov.train.data.sources import Source, describe_inputs, open_sources, tokenizer_folder
from megatron_sov.work.progress.resumable import ResumableArtifact, resumable_artifact

FORMATS = ("text", "chat", "preference", "prompt")
PART_TOKENS = 65_536
"""Tokens per part: half a gigabyte at a hidden size of 4,096 in bf16."""


@dataclass(frozen=True)
class TeacherReading:
    """Documents for a teacher to read, and the outputs to write."""

    target: Target
    """The teacher's model."""
    data: dict[str, float]
    """Token artifact -> weight, which is ignored."""
    splits: tuple[str, ...] = ("train", "heldout")
    state_format: StateFormat = StateFormat()
    part_tokens: int = PART_TOKENS
    digest: str = ""
    """Digest from `hash_weights`; "": not computed yet."""


def write_outputs(reading: TeacherReading, out: Path, settings: Sequence[str], nproc: int | None, *,
                  overwrite: bool = False, redo: bool = False) -> None:
    """Write a teacher's outputs for all documents as an artifact.

    Args:
        reading: teacher and documents.
        out: the artifact, which appears when complete; a killed job continues.
        settings: layout and precision of the teacher, ``key=value``.
        nproc: local processes; under torchrun or Slurm the environment decides.
        overwrite: replace an existing artifact.
        redo: start again if unfinished work has other settings.

    Raises:
        UserError: the teacher has another tokenizer, a document is too long for the teacher, or the data
            cannot be read.
    """
    _check_format(reading)
    if is_first_rank():  # checked before a large model is loaded
        check_output_folder(out, KIND, overwrite)
    sources = open_sources(reading.data, reading.target.vocab_size, FORMATS)
    check_same_tokens(tokenizer_folder(sources), reading.target.tokenizer_folder)
    _refuse_too_long(reading, sources)
    parts = plan_parts(sources, reading.splits, reading.part_tokens)
    # The layout changes only the last digits: a killed job may continue at another layout.
    plan = {"parts": parts, "kept": asdict(reading.state_format),
            "settings": [s for s in settings if not s.startswith("parallel.")]}
    # Recorded for a bit-exact repetition.
    layout = {"settings": list(settings), "processes": num_ranks(nproc)}

    def write_missing(loaded: LoadedModel) -> int:
        with contextlib.ExitStack() as stack:
            artifacts: list[ResumableArtifact] = []  # opened by rank 0 alone

            def open_artifact() -> tuple[str, list[str]]:
                artifacts.append(stack.enter_context(_open_artifact(
                    reading, sources, plan, layout, out=out, overwrite=overwrite, redo=redo)))
                return str(artifacts[0].path), list(artifacts[0].finished)

            folder, finished = run_on_main(loaded.world, open_artifact)
            missing = [p for p in parts if p.file not in finished]
            for first in range(0, len(missing), loaded.world.dp_size):
                batch = missing[first:first + loaded.world.dp_size]
                _read_parts(loaded, reading, sources, batch, Path(folder))
                # A barrier: every rank has written its part before the parts are recorded as finished.
                collectives.all_reduce_world(torch.zeros(1, dtype=torch.float64))
                run_on_main(loaded.world, partial(_record_finished, artifacts, batch))
            return len(missing)

    run_forward_model(reading.target, settings, nproc, write_missing)
    release_gpu_memory()  # the rank may continue as a student


def hash_weights(target: Target) -> str:
    """Return a model's BLAKE3 digest over weight files, configuration and adapter base."""
    if target.is_hf:
        model: dict[str, Any] = {p.name: hash_file(p) for p in target.path.glob("*.safetensors")}
        model["config.json"] = hash_file(target.path / "config.json")
    else:
        manifest, base = read_manifest(target.path, CHECKPOINT), read_adapter_base(target.path)
        model = {name: record.digest for name, record in manifest.files.items()
                 if name.startswith((MODEL, ADAPTER))}
        model |= {f"settings.{name}": manifest.settings.get(name) for name in ("model", "lora")}
        model["base"] = None if base is None else base.sha256
    digest = Digest(BLAKE3)
    digest.update(format_json(dict(sorted(model.items()))).encode())
    return digest.text()


@contextlib.contextmanager
def _open_artifact(reading: TeacherReading, sources: list[Source], plan: dict[str, Any],
                   layout: dict[str, Any], *, out: Path, overwrite: bool, redo: bool
                   ) -> Iterator[ResumableArtifact]:
    teacher = reading.digest or hash_weights(reading.target)
    weights = convert.open_weights(reading.target.path)
    model = weights.model
    # `resumable_artifact` continues unfinished work only with an equal plan.
    plan = plan | {"teacher": teacher, "data": [i["manifest_sha256"] for i in describe_inputs(sources)]}
    with resumable_artifact(out, KIND, "megatron-sov distill states", plan, overwrite=overwrite,
                            redo=redo) as artifact:
        (artifact.path / "states").mkdir(exist_ok=True)
        if not reading.state_format.top_k:
            head = weights.read("model.embed_tokens.weight" if model.tied_embeddings else "lm_head.weight")
            save_file({HEAD_WEIGHT: head.contiguous()}, artifact.path / HEAD)
        artifact.writer.content = build_content(plan["parts"], model.hidden_size, model.vocab_size,
                                                reading.state_format, model.logits_softcap)
        artifact.writer.settings = {"teacher": teacher, "teacher_path": str(reading.target.path), **layout}
        artifact.writer.inputs += describe_inputs(sources)
        yield artifact


def _record_finished(artifacts: list[ResumableArtifact], parts: list[StatesPart]) -> None:
    [artifact] = artifacts
    for part in parts:
        artifact.finish(part.file, FileRecord.of(artifact.path / part.file))


def _check_format(reading: TeacherReading) -> None:
    outputs, vocab_size = reading.state_format, reading.target.vocab_size
    if outputs.dtype not in DTYPES:
        raise UserError(f"dtype {outputs.dtype!r}: must be one of {', '.join(DTYPES)}")
    if not 0 <= outputs.top_k < vocab_size:
        raise UserError(f"--top-k {outputs.top_k}: must lie in [0, {vocab_size}), the token ids of the "
                        f"teacher {reading.target.path}")
    if not 0 < outputs.temperature < math.inf:
        raise UserError(f"--temperature {outputs.temperature}: must be a number greater than 0")


def _refuse_too_long(reading: TeacherReading, sources: list[Source]) -> None:
    for source in sources:
        for split in reading.splits:
            longest = read_lengths(source, split).max(initial=0)
            if longest > reading.target.max_tokens:
                raise UserError(f"source {source.name!r} ({split}): has a document of {longest} tokens, the "
                                f"teacher {reading.target.path} reads at most {reading.target.max_tokens}; "
                                "pack the data into shorter documents")


def _read_parts(loaded: LoadedModel, reading: TeacherReading, sources: list[Source],
                parts: Sequence[StatesPart], folder: Path) -> None:
    """Run the teacher on a part per data-parallel rank, and write the outputs; called by all ranks.

    Data-parallel ranks that share experts must run equal batches: rows are padded to the longest row, and
    rows of padding are added up to the largest part.
    """
    device, dp_rank, state_format = get_local_device(), loaded.world.dp_rank, reading.state_format
    lengths = [_read_part_lengths(sources, part) for part in parts]
    rows = [group_into_rows(part_lengths, ROW_TOKENS) for part_lengths in lengths]
    longest = 0
    for part_lengths, part_rows in zip(lengths, rows, strict=True):
        longest = max(longest, *(sum(part_lengths[i] for i in row) for row in part_rows))
    part = parts[dp_rank] if dp_rank < len(parts) else None
    local_rows = rows[dp_rank] if part else []
    documents = _read_documents(sources, part, lengths[dp_rank]) if part else []
    micro_batches = [DocumentBatch([documents[i] for i in row], device, longest) for row in local_rows]
    micro_batches += [DocumentBatch([[0]], device, longest)] * (max(map(len, rows)) - len(local_rows))

    def compute_outputs(hidden: list[torch.Tensor], head: Head, batch: DocumentBatch) -> torch.Tensor:
        if not state_format.top_k:
            return gather_states(hidden[0], loaded.policy).to("cpu", DTYPES[state_format.dtype])
        return pack_rows(
            *head.find_most_probable(hidden[0], state_format.top_k, state_format.temperature)).cpu()

    computed = loaded.policy.map(micro_batches, compute_outputs)
    # Tensor- and context-parallel ranks have the same rows; the first rank of a row writes.
    if part is not None and loaded.world.last_stage and collectives.is_first_of_row():
        row_lengths = [sum(lengths[dp_rank][i] for i in row) for row in local_rows]
        # Padding is dropped: the end of rows, and the rows after `row_lengths`.
        outputs = [output[:length] for output, length in zip(computed, row_lengths, strict=False)]
        _write_states(folder / part.file, outputs)


def _read_part_lengths(sources: list[Source], part: StatesPart) -> list[int]:
    """Return the token count of each document in a part."""
    lengths = sources[part.source].open_split(part.split).lengths
    return [int(lengths[part.first_document + number]) for number in range(part.num_documents)]


def _read_documents(sources: list[Source], part: StatesPart, lengths: list[int]) -> list[list[int]]:
    """Return the token ids of each document in a part; `lengths`: see `_read_part_lengths`."""
    shard = sources[part.source].open_split(part.split)
    return [shard.tokens(part.first_document + number, 0, length).tolist()
            for number, length in enumerate(lengths)]


def gather_states(hidden: torch.Tensor, model: ForwardModel) -> torch.Tensor:
    """Return the output head's inputs for all tokens in a row, [tokens, hidden]."""
    return context.gather_row(prepare_head_input(hidden, model.config))


def _write_states(file: Path, states: list[torch.Tensor]) -> None:
    """Write rows to `file` atomically; raise `UserError` if the disk is full."""
    with create_file(file) as temporary, open(temporary, "wb") as f:
        for row in states:
            f.write(row.contiguous().view(torch.uint8).numpy().data)
