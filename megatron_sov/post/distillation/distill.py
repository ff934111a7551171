"""Distillation: the student learns a teacher's distribution of the next token at the learned labels; its
divergence on held-out documents is measured before the first and after the last step.

A `StoredTeacher` reads outputs that the teacher's job wrote (`teacher`), so that memory holds only its output
head, on the last pipeline stage. A `LiveTeacher` reads responses that the student itself generated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from megatron_sov.base.artifacts import find_file_damage, read_manifest
from megatron_sov.base.documents import ROLLOUTS
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.divergence import (
    Divergence, Teacher, TeachersByToken, TeacherStates, TeacherTopK)
from megatron_sov.engine.model.logprobs import Head, build_head
from megatron_sov.engine.parallel import collectives, context
from megatron_sov.engine.parallel.device import to_device
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.infer.engines.load import load_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import DistillationConfig
from megatron_sov.post.distillation.state_files import HEAD_WEIGHT, StateFiles, unpack_rows
from megatron_sov.post.distillation.teacher import gather_states, hash_weights
from megatron_sov.runs.checkpoints import read_checkpoint_settings
from megatron_sov.runs.obs.meters import Meter
from megatron_sov.train.data.order import OrderedSample
from megatron_sov.train.data.requirements import NeededColumn
from megatron_sov.train.data.rows import RowOrigin, build_heldout_samples, build_row, join_rows
from megatron_sov.train.data.token_shards import TEXTS, Source
from megatron_sov.train.guards.gate import GateView
from megatron_sov.train.objectives.data_batches import ObjectiveContext
from megatron_sov.train.objectives.data_objective import DataObjective
from megatron_sov.train.objectives.microbatch import MicroBatch, build_micro_batch
from megatron_sov.train.objectives.objective import (
    GlobalBatch, LossSums, get_columns, get_formats, per_source, with_denominators)

DIVERGENCE, CROSS_ENTROPY = "divergence", "cross_entropy"
SPLIT = "heldout"


class RunTeacher(Protocol):
    """A teacher whose distributions a run learns."""

    teacher: str
    divergence: Divergence

    def verify(self, world: ParallelWorld) -> None:
        """Verify the teacher's files; called by all processes together before the first read."""
        ...

    def read(self, batches: Sequence[MicroBatch]) -> tuple[MicroBatch, ...]:
        """Run the teacher on micro-batches before the student learns them; called by all processes
        together."""
        ...

    def at(self, batch: MicroBatch, head: Head, split: str = "train") -> Teacher:
        """Return the teacher's outputs at the local tokens of a micro-batch from `read`.

        Args:
            batch: the micro-batch.
            head: the student's head, whose vocabulary shard the teacher's head follows.
            split: split of the documents.
        """
        ...

    def heard(self, batch: MicroBatch, split: str = "train") -> torch.Tensor:
        """Return the weight per label in whole rows, [n]: 0 for labels without teacher outputs."""
        ...


class StoredTeacher:
    """Teacher outputs on disk; each source has one teacher."""

    def __init__(self, folders: Sequence[StateFiles], asked: DistillationConfig, sources: Sequence[Source],
                 vocab_size: int) -> None:
        """Check the outputs against the settings."""
        for files in folders:
            check_outputs(files, asked, vocab_size)
        self._by_source = {index: files for files in folders for index in files.sources}
        for index, source in enumerate(sources):
            if index not in self._by_source:
                raise UserError(f"{', '.join(str(files.folder) for files in folders)}: the teacher has not "
                                f"read source {source.name!r} of {source.artifact}; let `megatron-sov "
                                "distill states` read it, and name its folder by --states too")
        digests = {source.name: self._by_source[index].teacher for index, source in enumerate(sources)}
        self.teacher = folders[0].teacher
        if not {*digests.values()} <= {self.teacher}:
            self.teacher = ", ".join(f"{name}: {digest}" for name, digest in digests.items())
        self.divergence = Divergence(asked.beta, asked.temperature)
        self._asked = asked
        # Folders by one teacher share its head; the dtype of states may differ.
        self._kinds = list({(f.teacher, f.dtype): f for f in folders}.values())
        kinds = [(f.teacher, f.dtype) for f in self._kinds]
        self._kind_of = {index: kinds.index((f.teacher, f.dtype)) for index, f in self._by_source.items()}
        self._heads: dict[int, torch.Tensor] = {}

    def verify(self, world: ParallelWorld) -> None:
        """Verify all files, each on one process; see `RunTeacher.verify`."""
        folders = sorted({files.folder for files in self._by_source.values()})
        files = [(folder / name, record) for folder in folders
                 for name, record in read_manifest(folder).files.items()]
        # Checksums read whole files, so each process verifies its share; all processes raise the same error.
        local_files = range(world.rank, len(files), world.size)
        damaged = next((i + 1 for i in local_files if find_file_damage(*files[i])), 0)
        for number in collectives.gather_numbers(float(damaged)):
            if number:
                raise UserError(f"{find_file_damage(*files[int(number) - 1])}; make the states again with "
                                "`megatron-sov distill states`")

    def read(self, batches: Sequence[MicroBatch]) -> tuple[MicroBatch, ...]:
        """Return the batches: their outputs are on disk."""
        return tuple(batches)

    def at(self, batch: MicroBatch, head: Head, split: str = "train") -> Teacher:
        pieces = context.get_local_pieces(len(batch.labels))
        if self._asked.top_k:
            ids, logprobs = unpack_rows(self._read_rows(batch.origins, pieces, split))
            # A positive log-probability marks a missing output: `heard` returns weight 0, and 0 stays finite.
            return TeacherTopK(ids, logprobs.where(logprobs[:, :1] <= 0, 0.0), self._asked.keep_remainder)
        kinds = sorted({self._kind_of[source] for _, source, _ in batch.origins}) or [0]
        teachers = [TeacherStates(self._read_rows(batch.origins, pieces, split, kind),
                                  self._load_head(kind, head), self._kinds[kind].logits_softcap)
                    for kind in kinds]
        if len(kinds) == 1:
            return teachers[0]
        # Padding has no weight, so any teacher may own padding.
        owners = torch.zeros(sum(end - first for first, end in pieces), dtype=torch.int64)
        for local_slice, source, _, _, _ in _iter_overlaps(batch.origins, pieces):
            owners[local_slice] = kinds.index(self._kind_of[source])
        return TeachersByToken(owners, teachers)

    def heard(self, batch: MicroBatch, split: str = "train") -> torch.Tensor:
        """Return 0 for labels at which the teacher's tokens are not aligned; see `RunTeacher.heard`."""
        if not self._asked.other_tokenizer:
            return batch.weights
        rows = self._read_rows(batch.origins, [(0, len(batch.labels))], split)
        says = unpack_rows(rows)[1][:, 0] <= 0
        return batch.weights * to_device(says, batch.weights.device)

    def _read_rows(self, origins: tuple[RowOrigin, ...], pieces: Sequence[tuple[int, int]], split: str,
              kind: int = 0) -> torch.Tensor:
        """Return the outputs at n tokens of a row, [n, width]; finite placeholders for padding and for tokens
        with other teachers, which have no weight."""
        files, top_k = self._kinds[kind], self._asked.top_k
        rows = torch.zeros(sum(end - first for first, end in pieces), files.width, dtype=files.dtype)
        if top_k:
            rows[:, :top_k] = torch.arange(top_k)  # distinct ids with log-probability 0
        for local_slice, source, document, start, count in _iter_overlaps(origins, pieces):
            # Most probable tokens have equal shapes for all teachers.
            if top_k or self._kind_of[source] == kind:
                rows[local_slice] = self._by_source[source].states(source, split, document, start, count)
        return rows

    def _load_head(self, kind: int, head: Head) -> torch.Tensor:
        """Return the teacher's head for the student's vocabulary shard, [V / tp, H'], in its dtype; read
        once, on the last pipeline stage."""
        if kind not in self._heads:
            token_ids, files = head.token_ids, self._kinds[kind]
            weight = head.weight.new_zeros(len(head.weight), files.hidden_size)
            if token_ids:
                with safe_open(files.head, "pt") as file:
                    # Only the shard is read; padding rows in the student's head stay 0.
                    shard = file.get_slice(HEAD_WEIGHT)[token_ids.start:token_ids.stop]
                    weight[:len(token_ids)] = shard.to(weight)
            self._heads[kind] = weight
        return self._heads[kind]


def _iter_overlaps(origins: tuple[RowOrigin, ...], pieces: Sequence[tuple[int, int]]
            ) -> Iterator[tuple[slice, int, int, int, int]]:
    """Yield the intersections of a row's pieces (of context parallelism) with its documents: the slice among
    the tokens of all pieces, source, document, first token, number of tokens."""
    offset = 0
    for first, end in pieces:
        for begins, source, (document, start, count) in origins:
            begin, stop = max(first, begins), min(end, begins + count)
            if begin < stop:
                yield (slice(offset + begin - first, offset + stop - first), source, document,
                       start + begin - begins, stop - begin)
        offset += end - first


class LiveTeacher:
    """A teacher on the student's processes and layout, which reads each batch just before the student learns
    it.

    Megatron-Core has one set of process groups per process, so a teacher with its own layout is another job
    (`teacher`). Nothing is kept on disk: a resumed run computes the same outputs again.
    """

    def __init__(self, checkpoint: Path, config: RunConfig, num_ranks: int) -> None:
        """Check the teacher against the run.

        Raises:
            UserError: the teacher has another vocabulary size, reads shorter rows, or does not fit the
                layout.
        """
        distillation, theirs = config.distillation, read_checkpoint_settings(checkpoint)
        self.teacher = hash_weights(Target(checkpoint, False))
        self.divergence = Divergence(distillation.beta, distillation.temperature)
        self._path, self._asked = checkpoint, distillation
        # Expert parallelism and the pipeline layout fit the student's layers alone.
        overrides: dict[str, Any] = {} if theirs.model.num_experts else {"ep": 1, "etp": 1}
        if theirs.model.num_layers != config.model.num_layers:
            overrides["pipeline_layout"] = ()
        self._config = dataclasses.replace(config, model=theirs.model, lora=theirs.lora,
                                           parallel=dataclasses.replace(config.parallel, **overrides))
        if distillation.other_tokenizer:
            raise UserError("distillation.other_tokenizer = True: a teacher of another tokenizer reads whole "
                            "documents; have `megatron-sov distill` learn from it, or choose one of the same")
        if theirs.model.vocab_size != config.model.vocab_size:
            raise UserError(f"--teacher {checkpoint}: has {theirs.model.vocab_size} token ids, the student "
                            f"model.vocab_size = {config.model.vocab_size}; choose a teacher with as many")
        if distillation.top_k >= theirs.model.vocab_size:
            raise UserError(f"distillation.top_k = {distillation.top_k}: must be below the "
                            f"{theirs.model.vocab_size} token ids; set it to less, or to 0")
        if config.data.max_seq_len() > theirs.model.max_position_tokens:
            raise UserError(f"--teacher {checkpoint}: reads {theirs.model.max_position_tokens} tokens, and a "
                            f"row has up to {config.data.max_seq_len()}; choose another one, or shorter rows")
        if problems := self._config.parallel.problems(self._config.model, num_ranks):
            raise SettingsError(f"--teacher {checkpoint}: runs at the layout of the student", problems)
        self._model: ForwardModel | None = None

    def verify(self, world: ParallelWorld) -> None:
        """Load the model; called by all processes together."""
        self._model = load_forward_model(self._path, self._config)

    def read(self, batches: Sequence[MicroBatch]) -> tuple[MicroBatch, ...]:
        """Attach the teacher's outputs to micro-batches; called by all processes together."""
        model, top_k = self._model, self._asked.top_k
        assert model is not None, "the teacher is not loaded"

        def compute_outputs(hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
            if not top_k:
                return gather_states(hidden[0], model)
            ids, logprobs = head.find_most_probable(hidden[0], top_k, self.divergence.temperature)
            return torch.cat([ids.to(logprobs.dtype), logprobs], 1)

        # Replayed expert routes belong to the student.
        read = [dataclasses.replace(b, inputs=dataclasses.replace(b.inputs, routes=None)) for b in batches]
        outputs = model.map(read, compute_outputs)
        if not outputs:  # a pipeline stage before the last, which computes no loss
            return tuple(batches)
        return tuple(dataclasses.replace(batch, teacher_output=output)
                     for batch, output in zip(batches, outputs, strict=True))

    def at(self, batch: MicroBatch, head: Head, split: str = "train") -> Teacher:
        assert batch.teacher_output is not None and self._model is not None, (
            "the teacher has not read the micro-batch")
        outputs = context.select_local(batch.teacher_output)
        if top_k := self._asked.top_k:
            return TeacherTopK(outputs[:, :top_k].long(), outputs[:, top_k:], self._asked.keep_remainder)
        weight = build_head(self._model.model, self._model.head_chunk_tokens).weight
        return TeacherStates(outputs, weight, self._config.model.logits_softcap)

    def heard(self, batch: MicroBatch, split: str = "train") -> torch.Tensor:
        """Return all weights; see `RunTeacher.heard`."""
        return batch.weights


def check_outputs(files: StateFiles, asked: DistillationConfig, vocab_size: int) -> None:
    """Raise `UserError` if the artifact has other outputs than `distillation` requires, or another
    vocabulary."""
    stored = files.kept
    if stored.top_k != asked.top_k:
        raise UserError(f"{files.folder}: holds {_describe_outputs(stored.top_k)} of the teacher, and "
                        f"distillation.top_k = {asked.top_k} asks for {_describe_outputs(asked.top_k)}; set "
                        f"it to {stored.top_k}, or name another folder")
    if stored.translated != asked.other_tokenizer:
        raise UserError(f"{files.folder}: holds {'the student' if stored.translated else 'the teacher'}'s "
                        f"own tokens, and distillation.other_tokenizer = {asked.other_tokenizer}; set it to "
                        f"{stored.translated}, or name another folder")
    if stored.top_k and stored.temperature != asked.temperature:
        raise UserError(f"{files.folder}: its log-probabilities are those at temperature "
                        f"{stored.temperature}, and distillation.temperature = {asked.temperature}; set "
                        "it to that, or name another folder")
    if stored.translated:
        if files.vocab_size > vocab_size:
            raise UserError(f"{files.folder}: its tokens are those of a tokenizer of {files.vocab_size} ids, "
                            f"the student has model.vocab_size = {vocab_size}; set it, or read other data")
    elif files.vocab_size != vocab_size:
        raise UserError(f"{files.folder}: its teacher has {files.vocab_size} token ids, the student "
                        f"model.vocab_size = {vocab_size}; choose a teacher with as many")


def _describe_outputs(top_k: int) -> str:
    return f"the {top_k} most probable tokens" if top_k else "the final hidden states"


class Distillation(DataObjective):
    """Objective ``(divergence(teacher, student) + ce_coeff * CE) / learned tokens``, with multi-token
    prediction by cross-entropy on the data."""

    meters = ("kl", "entropy")
    headline = (Meter("kl", "KL to the teacher", "nats", "lower", heldout="heldout_divergence.kl"),)

    def __init__(self, context: ObjectiveContext) -> None:
        super().__init__(context)
        teacher: RunTeacher = context.teacher
        teacher.verify(context.world)
        self._teacher = teacher
        self.coefficients = {DIVERGENCE: 1.0}
        if context.config.distillation.ce_coeff > 0:
            self.coefficients[CROSS_ENTROPY] = context.config.distillation.ce_coeff
        self.coefficients |= self._mtp_coefficient

    def collect(self, policy: Any, step: int) -> GlobalBatch:
        """Return the next batch in the data order, with teacher outputs."""
        batch = super().collect(policy, step)
        return dataclasses.replace(batch, micro_batches=self._teacher.read(batch.micro_batches))

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count the learned tokens in the global batch."""
        hosts = [m.host for m in batch.micro_batches]
        # Two denominators: labels without teacher outputs still count for cross-entropy.
        targets = {DIVERGENCE: sum(float(self._teacher.heard(m).double().sum()) for m in hosts)}
        if CROSS_ENTROPY in self.coefficients:
            targets[CROSS_ENTROPY] = sum(float(m.weights.double().sum()) for m in hosts)
        return with_denominators(batch, targets | self._count_mtp_targets(hosts))

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        """Return the summed divergence over learned labels, and cross-entropy if `ce_coeff` is above 0."""
        weights = self._teacher.heard(batch)
        terms, measured = head.divergence(hidden[0], self._teacher.at(batch, head), {DIVERGENCE: weights},
                                          self._teacher.divergence)
        if CROSS_ENTROPY in self.coefficients:
            terms |= head.cross_entropy(hidden[0], batch.labels, {CROSS_ENTROPY: batch.weights})[0]
        terms |= self._compute_mtp_sum(hidden, head, batch)
        learned = (weights > 0).double()
        return LossSums(
            terms, per_source(measured.divergence, weights, batch.sources, self._num_sources),
            meters={name: ((getattr(measured, name) * learned).sum(), learned.sum()) for name in self.meters})

    def state(self) -> dict[str, str]:
        return {"teacher": self._teacher.teacher}

    def restore(self, state: dict[str, str]) -> None:
        """Check that a resumed run has the same teacher: its loss curve would mix two targets."""
        if state["teacher"] != self._teacher.teacher:
            raise UserError(f"--teacher: is {self._teacher.teacher}, and the run has learned from "
                            f"{state['teacher']} so far; resume with that teacher, or start a new --run "
                            "--from its checkpoint")


class OnPolicyDistillation(Distillation):
    """`Distillation` on the student's own responses, and on packed data instead (GKD, arXiv 2306.13649)."""

    formats = (ROLLOUTS, *TEXTS)


@dataclasses.dataclass(frozen=True)
class TeacherFactory:
    """Factory for an objective with a teacher in its context."""

    made: Callable[[ObjectiveContext], Any]
    teachers: Sequence[RunTeacher]
    """The teacher; empty: the run is complete, and no objective is built."""

    @property
    def formats(self) -> tuple[str, ...]:
        return get_formats(self.made)

    @property
    def columns(self) -> Mapping[str, NeededColumn]:
        return get_columns(self.made)

    def __call__(self, context: ObjectiveContext) -> Any:
        return self.made(dataclasses.replace(context, teacher=self.teachers[0]))


def measure_heldout(view: GateView, sources: Sequence[Source],
                    teacher: RunTeacher) -> dict[str, dict[str, float]]:
    """Measure the divergence on the held-out documents of each source, and record it; called by all processes
    together.

    Returns:
        Source -> `tokens`, the learned ones of up to `data.heldout_tokens`, and means over them:
        `divergence`, the objective's, and `kl`, KL(teacher || student) in nats.
    """
    figures = {}
    for index, source in enumerate(sources):
        if source.num_tokens.get(SPLIT, 0) > 1:
            tokens, divergence, kl = _sum_teacher_divergences(view, index, source, teacher).tolist()
            if tokens:
                figures[source.name] = {"tokens": int(tokens), "divergence": divergence / tokens,
                                        "kl": kl / tokens}
                view.events.write("heldout_divergence", step=view.step, source=source.name,
                                  **figures[source.name])
    return figures


def measure_teacher(view: GateView, sources: Sequence[Source], teacher: RunTeacher | None) -> dict[str, Any]:
    """Return the teacher's digest and `measure_heldout` for the completion manifest; {} without a teacher."""
    if teacher is None:
        return {}
    return {"teacher": teacher.teacher, "heldout_divergence": measure_heldout(view, sources, teacher)}


def _sum_teacher_divergences(view: GateView, index: int, source: Source, teacher: RunTeacher) -> torch.Tensor:
    """Return learned tokens, and sums of divergence and KL over them, [3] float64, on every process."""
    config, world, shard = view.config, view.world, source.open_split(SPLIT)
    seq_len, size = config.data.max_seq_len(), config.train.micro_batch_size
    samples = build_heldout_samples(shard, index, seq_len, config.data.heldout_tokens)
    # Empty rows, so that all processes run equally many batches: they may share experts.
    samples += [OrderedSample(index, ())] * (-len(samples) % (size * world.dp_size))
    local_batches = [build_micro_batch(join_rows([build_row(s, shard, seq_len) for s in samples[i:i + size]]))
           for i in range(world.dp_rank * size, len(samples), size * world.dp_size)]

    def sums(hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
        _, measured = head.divergence(hidden[0], teacher.at(batch, head, SPLIT), {}, teacher.divergence)
        learned = (teacher.heard(batch, SPLIT) > 0).double()
        return torch.stack([learned.sum(), (measured.divergence * learned).sum(),
                            (measured.kl * learned).sum()])

    parts = view.policy.map(teacher.read(local_batches), sums)
    local = torch.stack(parts).sum(0).cpu() if parts else torch.zeros(3, dtype=torch.float64)
    return collectives.broadcast_from_last_stage(collectives.all_reduce_dp(local))
