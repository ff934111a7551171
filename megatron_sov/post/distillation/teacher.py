"""The teacher of a distillation as a job of its own: any model at any layout reads packed documents and
leaves its final hidden states, or its most probable tokens (`state_files`).

Two layouts cannot run in one process, since the library's process groups are one per process; files connect
the teacher and its student.  A killed job goes on after its last finished part.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_sov import convert
from megatron_sov.base.artifacts import FileRecord, new_file, read_manifest, refuse_existing, to_json
from megatron_sov.base.digests import BLAKE3, Digest, file_digest
from megatron_sov.base.errors import UserError
from megatron_sov.chat.vocabulary import check_same_tokens
from megatron_sov.engine.decode.forward_only import ForwardModel, Inputs
from megatron_sov.engine.model.language_model import states_for_head
from megatron_sov.engine.model.logprobs import Head
from megatron_sov.engine.parallel import collectives, context
from megatron_sov.engine.parallel.device import local_device, release_unused
from megatron_sov.engine.parallel.world import ParallelWorld, on_main
from megatron_sov.eval.heldout import ROW_TOKENS, rows_of
from megatron_sov.infer.engines.load import Loaded, run_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.post.distillation.state_files import (
    DTYPES, HEAD, HEAD_WEIGHT, KIND, Kept, StatesPart, content_of, lengths_of, packed, parts_of, unpacked)
from megatron_sov.post.distillation.translation import TokenTranslation, TranslatedStates
from megatron_sov.runs.checkpoints import ADAPTER, CHECKPOINT_KIND as CHECKPOINT, MODEL, read_adapter_base
from megatron_sov.runs.launch_environment import is_first_rank, num_ranks
from megatron_sov.train.data.token_shards import Source, open_sources, provenance, tokenizer_folder
from megatron_sov.work.progress.resumable import ResumableArtifact, resumable_artifact


@dataclass(frozen=True)
class ArtifactOnRanks:
    """The artifact as every rank sees it."""

    folder: Path
    """Where its files are written, by whichever rank."""
    finished: frozenset[str]
    """Files that an earlier command has finished."""
    on_main: Callable[[Callable[[ResumableArtifact], None]], None]
    """Has the first rank do something with the artifact; called by all together."""


@contextlib.contextmanager
def artifact_on_ranks(world: ParallelWorld,
                      opened: Callable[[], contextlib.AbstractContextManager[ResumableArtifact]]
                      ) -> Iterator[ArtifactOnRanks]:
    """Give an artifact that the first rank opens; called by all together."""
    with contextlib.ExitStack() as held:
        own: list[ResumableArtifact] = []

        def begin() -> tuple[str, list[str]]:
            # Only the first rank has the artifact; the others write files into its folder.
            own.append(held.enter_context(opened()))
            return str(own[0].path), list(own[0].finished)

        folder, finished = on_main(world, begin)
        yield ArtifactOnRanks(Path(folder), frozenset(finished),
                              lambda do: on_main(world, lambda: do(own[0])))


FORMATS = ("text", "chat", "preference", "prompt")
PART_TOKENS = 65_536
"""Tokens of a part: half a gigabyte at a hidden size of 4,096 in bf16."""


@dataclass(frozen=True)
class TeacherReading:
    """What a teacher reads and what is kept of it."""

    target: Target
    """The teacher."""
    data: dict[str, float]
    """Token artifact -> weight, which does not matter here."""
    splits: tuple[str, ...] = ("train", "heldout")
    kept: Kept = Kept()
    part_tokens: int = PART_TOKENS
    digest: str = ""
    """The teacher's `weights_digest` where it is known, so that its files are not read for it again."""


def read_documents(reading: TeacherReading, out: Path, settings: Sequence[str], nproc: int | None, *,
                   overwrite: bool = False, redo: bool = False) -> None:
    """Write what a teacher says of all documents as an artifact.

    Args:
        reading: what is read.
        out: the artifact; it appears only when complete, and a killed job goes on where it was.
        settings: the teacher's layout and precision, ``key=value``.
        nproc: local processes; under torchrun or Slurm the environment decides.
        overwrite: replace an artifact that is already there.
        redo: begin anew where work on it was asked for otherwise and is unfinished.

    Raises:
        UserError: the tokens mean something else to the teacher, a document is too long for it, the data
            cannot be read.
    """
    _check_kept(reading)
    if is_first_rank():  # else it would be found behind the loading of a large model
        refuse_existing(out, KIND, overwrite)
    translated = reading.kept.translated
    # A translated teacher knows other ids, so its vocabulary bounds nothing here.
    sources = open_sources(reading.data, sys.maxsize if translated else reading.target.vocab_size, FORMATS)
    if not translated:
        check_same_tokens(tokenizer_folder(sources), reading.target.tokenizer_folder)
    translation = _translation(reading, sources)
    parts = parts_of(sources, reading.splits, reading.part_tokens)
    # the layout moves the last digits at most, so that a killed job may go on at another
    plan = {"parts": parts, "kept": asdict(reading.kept),
            "settings": [s for s in settings if not s.startswith("parallel.")]}
    # whoever asks the teacher again, bit for bit, needs it whole
    layout = {"settings": list(settings), "processes": num_ranks(nproc)}
    if translation is None:
        _refuse_too_long(reading, sources)

    def work(loaded: Loaded) -> int:
        opened = partial(_artifact, reading, sources, plan, layout, out, overwrite, redo)
        with artifact_on_ranks(loaded.world, opened) as artifact:
            missing = [p for p in parts if p.file not in artifact.finished]
            for first in range(0, len(missing), loaded.world.dp_size):
                together = missing[first:first + loaded.world.dp_size]
                _read_parts(loaded, _Documents(sources, reading, translation), together, artifact.folder)
                # A part is noted as finished only after every rank has written its own.
                collectives.all_reduce_world(torch.zeros(1, dtype=torch.float64))  # all files are written
                artifact.on_main(partial(_note, together))
            return len(missing)

    run_forward_model(reading.target, settings, nproc, work)
    release_unused()  # a rank of torchrun or Slurm may be a student's next


def weights_digest(target: Target) -> str:
    """Return the digest of a model: of its weights' files by name and content, of what says how they are
    used, and of an adapter's base."""
    if target.is_hf:
        model: dict[str, Any] = {p.name: file_digest(p) for p in target.path.glob("*.safetensors")}
        model["config.json"] = file_digest(target.path / "config.json")
    else:
        manifest, base = read_manifest(target.path, CHECKPOINT), read_adapter_base(target.path)
        model = {name: record.digest for name, record in manifest.files.items()
                 if name.startswith((MODEL, ADAPTER))}
        model |= {f"settings.{name}": manifest.settings.get(name) for name in ("model", "lora")}
        model["base"] = None if base is None else base.sha256
    digest = Digest(BLAKE3)
    digest.update(to_json(dict(sorted(model.items()))).encode())
    return digest.text()


@contextlib.contextmanager
def _artifact(reading: TeacherReading, sources: list[Source], plan: dict[str, Any], layout: dict[str, Any],
              out: Path, overwrite: bool, redo: bool) -> Iterator[ResumableArtifact]:
    teacher = reading.digest or weights_digest(reading.target)
    weights = convert.open_weights(reading.target.path)
    model = weights.model
    # Work that was begun with another plan is not gone on with.
    plan = plan | {"teacher": teacher, "data": [i["manifest_sha256"] for i in provenance(sources)]}
    with resumable_artifact(out, KIND, "megatron-sov distill states", plan, overwrite=overwrite,
                            redo=redo) as artifact:
        (artifact.path / "states").mkdir(exist_ok=True)
        if not reading.kept.top_k:
            head = weights.read("model.embed_tokens.weight" if model.tied_embeddings else "lm_head.weight")
            # States without the head say nothing; log-probabilities need none.
            save_file({HEAD_WEIGHT: head.contiguous()}, artifact.path / HEAD)
        vocab_size = sources[0].vocab_size if reading.kept.translated else model.vocab_size
        artifact.writer.content = content_of(plan["parts"], model.hidden_size, vocab_size, reading.kept,
                                             model.logits_softcap)
        artifact.writer.settings = {"teacher": teacher, "teacher_path": str(reading.target.path), **layout}
        artifact.writer.inputs += provenance(sources)
        yield artifact


def _note(parts: list[StatesPart], artifact: ResumableArtifact) -> None:
    for part in parts:
        artifact.finish(part.file, FileRecord.of(artifact.path / part.file))


def _check_kept(reading: TeacherReading) -> None:
    kept, vocab_size = reading.kept, reading.target.vocab_size
    if kept.dtype not in DTYPES:
        raise UserError(f"dtype {kept.dtype!r}: is none of {', '.join(DTYPES)}")
    if not 0 <= kept.top_k < vocab_size:
        raise UserError(f"--top-k {kept.top_k}: must lie in [0, {vocab_size}), the token ids of the teacher "
                        f"{reading.target.path}")
    if kept.translated and not kept.top_k:
        raise UserError("--top-k 0: of a teacher of another tokenizer the most probable tokens are kept; "
                        "pass --top-k 64, say")
    if not 0 < kept.temperature < math.inf:
        raise UserError(f"--temperature {kept.temperature}: must be a number greater than 0")


def _refuse_too_long(reading: TeacherReading, sources: list[Source]) -> None:
    for source in sources:
        for split in reading.splits:
            longest = lengths_of(source, split).max(initial=0)
            if longest > reading.target.max_tokens:
                raise UserError(f"source {source.name!r} ({split}): has a document of {longest} tokens, the "
                                f"teacher {reading.target.path} reads {reading.target.max_tokens} at most; "
                                "pack the data into shorter documents")


@dataclass(frozen=True)
class _Documents:
    """The documents that a teacher reads, in its own tokens."""

    sources: list[Source]
    reading: TeacherReading
    translation: TokenTranslation | None
    """None: the data are of its own tokenizer."""

    def of(self, part: StatesPart) -> tuple[list[list[int]], list[TranslatedStates]]:
        """Return the tokens that it reads of a part's documents, and how they lie beside the data's.

        Raises:
            UserError: one is too long for it, or its tokenizer changes the text.
        """
        shard = self.sources[part.source].shard(part.split)
        numbers = range(part.first_document, part.first_document + part.num_documents)
        found = [shard.tokens(number, 0, int(shard.lengths[number])).tolist() for number in numbers]
        if self.translation is None:
            return found, []
        translated = [self.translation.document(ids) for ids in found]
        longest = max((len(t.ids) for t in translated), default=0)
        if longest > self.reading.target.max_tokens:
            raise UserError(f"source {self.sources[part.source].name!r} ({part.split}): has a document of "
                            f"{longest} of the teacher's tokens, {self.reading.target.path} reads "
                            f"{self.reading.target.max_tokens} at most; pack the data into shorter documents")
        return [t.ids for t in translated], translated

    def translate(self, part: StatesPart, translated: list[TranslatedStates], said: list[torch.Tensor]
                  ) -> list[torch.Tensor]:
        """Return rows in the data's tokens, of each document what the teacher said of its own."""
        assert self.translation is not None
        shard, kept = self.sources[part.source].shard(part.split), self.reading.kept
        rows = []
        for i, (document, row) in enumerate(zip(translated, said, strict=True)):
            number = part.first_document + i
            ids = shard.tokens(number, 0, int(shard.lengths[number])).tolist()
            of_next = row[:, -1].contiguous().view(torch.float32)
            rows.append(packed(*self.translation.rows(document, ids, *unpacked(row[:, :-1]), of_next,
                                                      kept.top_k)))
        return rows


def _translation(reading: TeacherReading, sources: list[Source]) -> TokenTranslation | None:
    if not reading.kept.translated:
        return None
    folder = tokenizer_folder(sources)
    if folder is None:
        raise UserError(f"{', '.join(map(str, reading.data))}: has no tokenizer beside it, and what another "
                        "one says is read by bytes; pack the data again")
    if reading.kept.top_k >= sources[0].vocab_size:
        raise UserError(f"--top-k {reading.kept.top_k}: must be less than the data's {sources[0].vocab_size} "
                        "token ids")
    return TokenTranslation(folder, reading.target.tokenizer_folder, sources[0].vocab_size,
                            reading.target.vocab_size)


def _read_parts(loaded: Loaded, documents: _Documents, parts: Sequence[StatesPart], folder: Path) -> None:
    """Run the teacher on one part per data-parallel rank and write what it finds; called by all together.

    Where experts are spread over data-parallel ranks, these run in step: each gets as many rows as the one
    with the most, the last of padding alone.
    """
    device, mine, kept = local_device(), loaded.world.dp_rank, documents.reading.kept
    read = [documents.of(part) for part in parts]
    lengths = [[len(ids) for ids in of_part] for of_part, _ in read]
    rows = [rows_of(of_part, ROW_TOKENS) for of_part in lengths]
    # One length for all: rows of experts that are shared must have one shape.
    longest = max(sum(of_part[i] for i in row) for of_part, cut in zip(lengths, rows, strict=True)
                  for row in cut)
    part = parts[mine] if mine < len(parts) else None
    own_rows = rows[mine] if part else []
    micro_batches = [] if part is None else [
        Inputs([read[mine][0][i] for i in row], device, longest) for row in own_rows]
    # Padding up to the rank with the most rows, and for ranks without a part.
    micro_batches += [Inputs([[0]], device, longest)] * (max(map(len, rows)) - len(own_rows))
    # of a row in other tokens more is kept, since several of them may be one of the student's
    asked = min(2 * kept.top_k, documents.reading.target.vocab_size) if kept.translated else kept.top_k

    def kept_rows(hidden: list[torch.Tensor], head: Head, batch: Inputs) -> torch.Tensor:
        if not kept.top_k:
            return whole_states(hidden[0], loaded.policy).to("cpu", DTYPES[kept.dtype])
        found = packed(*head.most_probable(hidden[0], asked, kept.temperature)).cpu()
        if not kept.translated:
            return found
        # The teacher's own next token, which may not be among the most probable.
        of_next = head.logprobs(hidden[0], batch.inputs.tokens.roll(-1), kept.temperature)
        # As bits in one more column, so that rows have one type.
        return torch.cat([found, of_next.float().cpu()[:, None].view(torch.int32)], 1)

    found = loaded.policy.map(micro_batches, kept_rows)
    # One process of a row has all of its tokens, and writes them.
    if part is not None and loaded.world.last_stage and collectives.is_first_of_row():
        filled = [[lengths[mine][i] for i in row] for row in own_rows]
        # Without the padding of each row, and of rows that are padding alone.
        said = [s[:sum(n)] for s, n in zip(found, filled, strict=False)]
        if kept.translated:
            split = [document for s, n in zip(said, filled, strict=True) for document in s.split(n)]
            said = documents.translate(part, read[mine][1], split)
        _write(folder / part.file, said)


def whole_states(hidden: torch.Tensor, model: ForwardModel) -> torch.Tensor:
    """Return [n, H'] the states of all tokens of a row, as the output head takes them."""
    return context.gather(states_for_head(hidden, model.config))


def _write(file: Path, states: list[torch.Tensor]) -> None:
    """Write rows of what is kept, so that the file is there whole or not at all; `UserError` where the disk
    is full."""
    with new_file(file) as temporary, open(temporary, "wb") as f:
        for row in states:
            f.write(row.contiguous().view(torch.uint8).numpy().data)
