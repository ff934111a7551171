"""Distillation: the student learns a teacher's next-token distribution at the learned labels.

A `StoredTeacher` reads outputs that the job `distill states` wrote (teacher.py): memory holds only the output
head of the teacher, on the last pipeline stage. A `LiveTeacher` runs on the processes of the student, and
scores responses that the student generated (GKD). The divergence on held-out documents is measured before the
first and after the last step.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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
from megatron_sov.train.data.sources import TEXTS, Source
from megatron_sov.train.guards.gate import GateView
from megatron_sov.train.objectives.data_batches import ObjectiveContext
from megatron_sov.train.objectives.data_objective import DataObjective
from megatron_sov.train.objectives.microbatch import MicroBatch, build_micro_batch
from megatron_sov.train.objectives.objective import (
    GlobalBatch, LossSums, get_columns, get_formats, per_source, with_denominators)

DIVERGENCE, CROSS_ENTROPY = "divergence", "cross_entropy"
SPLIT = "heldout"
"""Split on which `measure_heldout` measures the divergence."""


class Distillation(DataObjective):
    """Objective ``divergence(teacher, student) / labels + ce_coeff * CE / labels``, with multi-token
    prediction by cross-entropy on the data (divergences: `engine.model.divergence.Divergence`)."""

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
        return dataclasses.replace(batch, micro_batches=self._teacher.attach_outputs(batch.micro_batches))

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count the learned labels in the global batch."""
        hosts = [m.host for m in batch.micro_batches]
        num_labels = sum(float(m.weights.double().sum()) for m in hosts)
        targets = {DIVERGENCE: num_labels}
        if CROSS_ENTROPY in self.coefficients:
            targets[CROSS_ENTROPY] = num_labels
        return with_denominators(batch, targets | self._count_mtp_targets(hosts))

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        """Sum the divergence over learned labels, and the cross-entropy if `ce_coeff` is above 0."""
        weights = batch.weights
        terms, measured = head.divergence(hidden[0], self._teacher.get_outputs(batch, head),
                                          {DIVERGENCE: weights}, self._teacher.divergence)
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
        """Raise `UserError` if a resumed run has another teacher: the loss curve would mix two targets."""
        if state["teacher"] != self._teacher.teacher:
            raise UserError(f"--teacher: is {self._teacher.teacher}, and the run has learned from "
                            f"{state['teacher']} so far; resume with that teacher, or start a new --run "
                            "--from the last checkpoint")


class OnPolicyDistillation(Distillation):
    """`Distillation` on the student's responses, and on packed data in other rounds (GKD, arXiv 2306.13649,
    algorithm 1)."""

    formats = (ROLLOUTS, *TEXTS)


@dataclasses.dataclass(frozen=True)
class TeacherFactory:
    """Factory for an objective with a teacher in `ObjectiveContext`."""

    build: Callable[[ObjectiveContext], Any]
    teachers: "Sequence[RunTeacher]"
    """The teacher, or none: a complete run and --dry-run build no objective, and open no states."""

    @property
    def formats(self) -> tuple[str, ...]:
        return get_formats(self.build)

    @property
    def columns(self) -> Mapping[str, NeededColumn]:
        return get_columns(self.build)

    def __call__(self, context: ObjectiveContext) -> Any:
        return self.build(dataclasses.replace(context, teacher=self.teachers[0]))


class RunTeacher(Protocol):
    """Source of the distributions that a run learns."""

    teacher: str
    """Digest of the teacher's weights, from `hash_weights`."""
    divergence: Divergence

    def verify(self, world: ParallelWorld) -> None:
        """Make the teacher ready: verify its files (`StoredTeacher`) or load its model (`LiveTeacher`).
        Called first, by all processes together."""

    def attach_outputs(self, batches: Sequence[MicroBatch]) -> tuple[MicroBatch, ...]:
        """Run the teacher on micro-batches before the student's step; called by all processes together."""

    def get_outputs(self, batch: MicroBatch, head: Head, split: str = "train") -> Teacher:
        """Return the outputs at the local tokens of a micro-batch from `attach_outputs`.

        Args:
            batch: the micro-batch.
            head: output head of the student; the head of the teacher gets the same vocabulary shard.
            split: split of the documents.
        """


class StoredTeacher:
    """Teacher outputs on disk, from one teacher per source."""

    def __init__(self, folders: Sequence[StateFiles], settings: DistillationConfig, sources: Sequence[Source],
                 vocab_size: int) -> None:
        """Assign `folders` to `sources`. Raises `UserError`: see `check_outputs`; a source has no folder."""
        for files in folders:
            check_outputs(files, settings, vocab_size)
        self._by_source = {index: files for files in folders for index in files.sources}
        """Source index -> the folder with the teacher's outputs for it."""
        for index, source in enumerate(sources):
            if index not in self._by_source:
                raise UserError(f"{', '.join(str(files.folder) for files in folders)}: the teacher has not "
                                f"read source {source.name!r} of {source.artifact}; read it with "
                                "`megatron-sov distill states`, and pass its folder by --states too")
        digests = {source.name: self._by_source[index].teacher for index, source in enumerate(sources)}
        self.teacher = folders[0].teacher
        if any(digest != self.teacher for digest in digests.values()):  # several teachers
            self.teacher = ", ".join(f"{name}: {digest}" for name, digest in digests.items())
        self.divergence = Divergence(settings.beta, settings.temperature)
        self._settings = settings
        # a teacher's folders all have the same head, so one folder per dtype supplies it
        by_teacher = {(files.teacher, files.dtype): files for files in folders}
        teacher_keys = list(by_teacher)
        self._teacher_files = list(by_teacher.values())
        """A `StateFiles` per (teacher, dtype of its states)."""
        self._source_teachers = {source: teacher_keys.index((files.teacher, files.dtype))
                                 for source, files in self._by_source.items()}
        """Source index -> index into `_teacher_files`."""
        self._heads: dict[int, torch.Tensor] = {}

    def verify(self, world: ParallelWorld) -> None:
        """Verify the checksums, every file on one process; see `RunTeacher.verify`."""
        folders = sorted({files.folder for files in self._by_source.values()})
        files = [(folder / name, record) for folder in folders
                 for name, record in read_manifest(folder).files.items()]
        # Checksums read whole files, so processes share the work; all processes raise the same error.
        local_indices = range(world.rank, len(files), world.size)
        first_damaged = next((index for index in local_indices if find_file_damage(*files[index])), -1)
        for index in map(int, collectives.gather_numbers(float(first_damaged))):
            if index >= 0:  # -1: the process found no damage
                raise UserError(f"{find_file_damage(*files[index])}; make the states again with "
                                "`megatron-sov distill states`")

    def attach_outputs(self, batches: Sequence[MicroBatch]) -> tuple[MicroBatch, ...]:
        """Return the micro-batches unchanged: the outputs are on disk."""
        return tuple(batches)

    def get_outputs(self, batch: MicroBatch, head: Head, split: str = "train") -> Teacher:
        pieces = context.get_local_pieces(len(batch.labels))
        if self._settings.top_k:
            ids, logprobs = unpack_rows(self._read_rows(batch.origins, pieces, split))
            return TeacherTopK(ids, logprobs, self._settings.keep_remainder)
        # [0]: a batch of padding has no origins
        indices = sorted({self._source_teachers[origin.source] for origin in batch.origins}) or [0]
        teachers = [TeacherStates(self._read_rows(batch.origins, pieces, split, index),
                                  self._load_head(index, head), self._teacher_files[index].logits_softcap)
                    for index in indices]
        if len(indices) == 1:
            return teachers[0]
        # Padding has weight 0: the first teacher owns padding.
        owners = torch.zeros(sum(end - first for first, end in pieces), dtype=torch.int64)
        for overlap in _iter_overlaps(batch.origins, pieces):
            owners[overlap.local_slice] = indices.index(self._source_teachers[overlap.source])
        return TeachersByToken(owners, teachers)

    def _read_rows(self, origins: tuple[RowOrigin, ...], pieces: Sequence[tuple[int, int]], split: str,
                   teacher_index: int = 0) -> torch.Tensor:
        """Read a teacher's outputs at the n tokens in `pieces`, [n, width]; finite placeholders for padding
        and for tokens of other teachers, which have weight 0."""
        files, top_k = self._teacher_files[teacher_index], self._settings.top_k
        rows = torch.zeros(sum(end - first for first, end in pieces), files.width, dtype=files.dtype)
        if top_k:
            rows[:, :top_k] = torch.arange(top_k)  # distinct ids with log-probability 0
        for local_slice, source, document, first_token, num_tokens in _iter_overlaps(origins, pieces):
            # Top-k rows have equal shapes for all teachers: read every teacher's rows.
            if top_k or self._source_teachers[source] == teacher_index:
                rows[local_slice] = self._by_source[source].read_states(source, split, document, first_token,
                                                                        num_tokens)
        return rows

    def _load_head(self, teacher_index: int, head: Head) -> torch.Tensor:
        """Return the teacher's output head for the vocabulary shard of `head`, [V / tp, H'], in the dtype of
        `head`; cached, on the last pipeline stage."""
        if teacher_index not in self._heads:
            token_ids, files = head.token_ids, self._teacher_files[teacher_index]
            weight = head.weight.new_zeros(len(head.weight), files.hidden_size)
            if token_ids:
                with safe_open(files.head, "pt") as file:
                    # Only the shard is read; padding rows stay 0.
                    shard = file.get_slice(HEAD_WEIGHT)[token_ids.start:token_ids.stop]
                    weight[:len(token_ids)] = shard.to(weight)
            self._heads[teacher_index] = weight
        return self._heads[teacher_index]


class LiveTeacher:
    """A teacher on the student's processes and layout, which reads micro-batches just before the step.

    Megatron-Core has one set of process groups per process, so a teacher with another layout runs as another
    job (teacher.py). Nothing is stored on disk: a resumed run computes the same outputs again.
    """

    def __init__(self, checkpoint: Path, config: RunConfig, num_ranks: int) -> None:
        """Check the teacher against the run's settings. Raises `UserError`: the teacher has another
        vocabulary size, reads shorter rows, or does not fit the layout."""
        distillation = config.distillation
        teacher = read_checkpoint_settings(checkpoint)
        self.teacher = hash_weights(Target(checkpoint, is_hf=False))
        self.divergence = Divergence(distillation.beta, distillation.temperature)
        self._path, self._settings = checkpoint, distillation
        # Expert parallelism and the pipeline layout fit the layers of the student only.
        overrides: dict[str, Any] = {} if teacher.model.num_experts else {"ep": 1, "etp": 1}
        if teacher.model.num_layers != config.model.num_layers:
            overrides["pipeline_layout"] = ()
        self._config = dataclasses.replace(config, model=teacher.model, lora=teacher.lora,
                                           parallel=dataclasses.replace(config.parallel, **overrides))
        if teacher.model.vocab_size != config.model.vocab_size:
            raise UserError(f"--teacher {checkpoint}: has {teacher.model.vocab_size} token ids, the student "
                            f"model.vocab_size = {config.model.vocab_size}; choose a teacher with as many")
        if distillation.top_k >= teacher.model.vocab_size:
            raise UserError(f"distillation.top_k = {distillation.top_k}: must be below the "
                            f"{teacher.model.vocab_size} token ids; set it to less, or to 0")
        if config.data.max_seq_len() > teacher.model.max_position_tokens:
            raise UserError(f"--teacher {checkpoint}: reads {teacher.model.max_position_tokens} tokens, and "
                            f"a row has up to {config.data.max_seq_len()}; choose another teacher, or "
                            "shorter rows")
        if problems := self._config.parallel.problems(self._config.model, num_ranks):
            raise SettingsError(f"--teacher {checkpoint}: runs at the layout of the student", problems)
        self._model: ForwardModel | None = None

    def verify(self, world: ParallelWorld) -> None:
        """Load the teacher model; called by all processes together."""
        self._model = load_forward_model(self._path, self._config)

    def attach_outputs(self, batches: Sequence[MicroBatch]) -> tuple[MicroBatch, ...]:
        """Compute `teacher_output` for micro-batches; called by all processes together."""
        model, top_k = self._model, self._settings.top_k
        assert model is not None, "the teacher is not loaded"

        def compute_outputs(hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
            if not top_k:
                return gather_states(hidden[0], model)
            ids, logprobs = head.find_most_probable(hidden[0], top_k, self.divergence.temperature)
            return torch.cat([ids.to(logprobs.dtype), logprobs], 1)

        # Replayed expert routes belong to the student.
        unrouted = [dataclasses.replace(b, inputs=dataclasses.replace(b.inputs, routes=None))
                    for b in batches]
        outputs = model.map(unrouted, compute_outputs)
        if not outputs:  # a pipeline stage before the last, which computes no loss
            return tuple(batches)
        return tuple(dataclasses.replace(batch, teacher_output=output)
                     for batch, output in zip(batches, outputs, strict=True))

    def get_outputs(self, batch: MicroBatch, head: Head, split: str = "train") -> Teacher:
        assert batch.teacher_output is not None and self._model is not None, (
            "the teacher has not read the micro-batch")
        outputs = context.select_local(batch.teacher_output)
        if top_k := self._settings.top_k:
            return TeacherTopK(outputs[:, :top_k].long(), outputs[:, top_k:], self._settings.keep_remainder)
        weight = build_head(self._model.model, self._model.head_chunk_tokens).weight
        return TeacherStates(outputs, weight, self._config.model.logits_softcap)


class _Overlap(NamedTuple):
    """Tokens of a document that lie in one of a row's local pieces."""

    local_slice: slice
    """Their indices among the local tokens."""
    source: int
    document: int
    first_token: int
    """Index of the first token in the document."""
    num_tokens: int


def _iter_overlaps(origins: tuple[RowOrigin, ...], pieces: Sequence[tuple[int, int]]) -> Iterator[_Overlap]:
    """Yield the overlap of each document with each piece; a piece is a range (first, end) of row indices."""
    num_earlier = 0  # local tokens in earlier pieces
    for piece_first, piece_end in pieces:
        for origin in origins:
            document, first_token, num_tokens = origin.segment
            # the overlap in row indices
            first, end = max(piece_first, origin.first), min(piece_end, origin.first + num_tokens)
            if first < end:
                local_first = num_earlier + (first - piece_first)
                yield _Overlap(slice(local_first, local_first + end - first), origin.source, document,
                               first_token + (first - origin.first), end - first)
        num_earlier += piece_end - piece_first


def check_outputs(files: StateFiles, settings: DistillationConfig, vocab_size: int) -> None:
    """Raise `UserError` if `files` have another `StateFormat` than `settings`, or another vocabulary."""
    stored = files.state_format
    if stored.top_k != settings.top_k:
        raise UserError(f"{files.folder}: holds {_describe_outputs(stored.top_k)} of the teacher, and "
                        f"distillation.top_k = {settings.top_k} asks for "
                        f"{_describe_outputs(settings.top_k)}; set it to {stored.top_k}, or name another "
                        "folder")
    if stored.top_k and stored.temperature != settings.temperature:
        raise UserError(f"{files.folder}: its log-probabilities are those at temperature "
                        f"{stored.temperature}, and distillation.temperature = {settings.temperature}; set "
                        "it to that, or name another folder")
    if files.vocab_size != vocab_size:
        raise UserError(f"{files.folder}: its teacher has {files.vocab_size} token ids, the student "
                        f"model.vocab_size = {vocab_size}; choose a teacher with as many")


def _describe_outputs(top_k: int) -> str:
    return f"the {top_k} most probable tokens" if top_k else "the final hidden states"


def measure_heldout(view: GateView, sources: Sequence[Source],
                    teacher: RunTeacher) -> dict[str, dict[str, float]]:
    """Measure the divergence on held-out documents per source, and record events `heldout_divergence`; called
    by all processes together.

    Returns:
        Source -> `tokens`, the learned labels among the first `data.heldout_tokens`, and means per label:
        `divergence` (of the objective) and `kl`, KL(teacher || student), in nats.
    """
    figures = {}
    for index, source in enumerate(sources):
        if source.num_tokens.get(SPLIT, 0) > 1:  # a single token has no label
            tokens, divergence, kl = _sum_teacher_divergences(view, index, source, teacher).tolist()
            if tokens:
                figures[source.name] = {"tokens": int(tokens), "divergence": divergence / tokens,
                                        "kl": kl / tokens}
                view.events.write("heldout_divergence", step=view.step, source=source.name,
                                  **figures[source.name])
    return figures


def measure_teacher(view: GateView, sources: Sequence[Source], teacher: RunTeacher | None) -> dict[str, Any]:
    """Return the teacher's digest and `measure_heldout` for the completion manifest; {} without one."""
    if teacher is None:
        return {}
    return {"teacher": teacher.teacher, "heldout_divergence": measure_heldout(view, sources, teacher)}


def _sum_teacher_divergences(view: GateView, index: int, source: Source, teacher: RunTeacher) -> torch.Tensor:
    """Return the number of learned labels, and the sums of divergence and KL over them,
    [3] float64, on every process."""
    config, world, shard = view.config, view.world, source.open_split(SPLIT)
    seq_len, size = config.data.max_seq_len(), config.train.micro_batch_size
    samples = build_heldout_samples(shard, index, seq_len, config.data.heldout_tokens)
    # Empty rows, so that all processes, which may share experts, run equally many micro-batches.
    samples += [OrderedSample(index, ())] * (-len(samples) % (size * world.dp_size))
    local_batches = []
    for first in range(world.dp_rank * size, len(samples), size * world.dp_size):
        rows = [build_row(sample, shard, seq_len) for sample in samples[first:first + size]]
        local_batches.append(build_micro_batch(join_rows(rows)))

    def sum_divergences(hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
        outputs = teacher.get_outputs(batch, head, SPLIT)
        _, measured = head.divergence(hidden[0], outputs, {}, teacher.divergence)
        learned = (batch.weights > 0).double()
        return torch.stack([learned.sum(), (measured.divergence * learned).sum(),
                            (measured.kl * learned).sum()])

    parts = view.policy.map(teacher.attach_outputs(local_batches), sum_divergences)
    local = torch.stack(parts).sum(0).cpu() if parts else torch.zeros(3, dtype=torch.float64)
    return collectives.broadcast_from_last_stage(collectives.all_reduce_dp(local))
