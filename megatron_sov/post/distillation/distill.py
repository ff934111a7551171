"""Learning a teacher's distribution of the next token, over the labels that the data have learned; and how
far the student is from it on held-out documents, before the first step and after the last.

The numbers of a teacher that is kept were computed before (`teacher`), so that nothing of it is in memory but
its output head, on the last pipeline stage.  They are read at the tokens of a micro-batch that this process
holds.  What a student writes itself is read by a teacher beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from megatron_sov.base.artifacts import file_damage, read_manifest
from megatron_sov.base.documents import ROLLOUTS
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import SettingsError
from megatron_sov.engine.decode.forward_only import ForwardModel
from megatron_sov.engine.model.divergence import (
    Divergence, SeveralTeachers, Teacher, TeacherStates, TeacherTopK)
from megatron_sov.engine.model.logprobs import Head, head_of
from megatron_sov.engine.parallel import collectives, context
from megatron_sov.engine.parallel.device import to_device
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.infer.engines.load import load_forward_model
from megatron_sov.infer.engines.target import Target
from megatron_sov.model.config import RunConfig
from megatron_sov.model.config.post_training import DistillationConfig
from megatron_sov.post.distillation.state_files import HEAD_WEIGHT, StateFiles, unpacked
from megatron_sov.post.distillation.teacher import weights_digest, whole_states
from megatron_sov.runs.checkpoints import read_checkpoint_settings
from megatron_sov.runs.obs.meters import Meter
from megatron_sov.train.data.order import OrderedSample
from megatron_sov.train.data.requirements import NeededColumn
from megatron_sov.train.data.rows import RowOrigin, heldout_samples, join_rows, sample_row
from megatron_sov.train.data.token_shards import TEXTS, Source
from megatron_sov.train.objectives.data_batches import ObjectiveContext
from megatron_sov.train.objectives.data_objective import DataObjective
from megatron_sov.train.objectives.microbatch import MicroBatch, from_row
from megatron_sov.train.objectives.objective import (
    GlobalBatch, LossSums, columns_of, formats_of, per_source, with_denominators)
from megatron_sov.train.stages.gate import GateView


class RunTeacher(Protocol):
    """Whose distributions a run learns."""

    teacher: str
    """Digest of its weights."""
    divergence: Divergence
    """Which is learned."""

    def verify(self, world: ParallelWorld) -> None:
        """Look at its files; called by all processes together, before anything is read.

        Raises:
            UserError: one is missing or is not what was written; on every process.
        """
        ...

    def read(self, batches: Sequence[MicroBatch]) -> tuple[MicroBatch, ...]:
        """Have it read micro-batches before they are learned; called by all processes together."""
        ...

    def at(self, batch: MicroBatch, head: Head, split: str = "train") -> Teacher:
        """Return what it says at the local tokens of a micro-batch, as `read` gave it.

        Args:
            batch: rows of documents of a split.
            head: the student's, by which the teacher's is split.
            split: which.

        Raises:
            UserError: it has not read one of them.
        """
        ...

    def heard(self, batch: MicroBatch, split: str = "train") -> torch.Tensor:
        """Return [n] what each label of a whole row weighs: as in the data where the teacher says something,
        else 0."""
        ...


class KeptTeacher:
    """What teachers have said of the data before: of each source one."""

    def __init__(self, folders: Sequence[StateFiles], asked: DistillationConfig, sources: Sequence[Source],
                 vocab_size: int) -> None:
        """Check that it can be learned from as the settings ask.

        Args:
            folders: what is kept of it.
            asked: the settings.
            sources: those that the run reads.
            vocab_size: the student's.

        Raises:
            UserError: something else of it was kept, it has not read a source, or it knows other token ids.
        """
        for files in folders:
            refuse_other_kept(files, asked, vocab_size)
        self._by_source = {index: files for files in folders for index in files.sources}
        for index, source in enumerate(sources):
            if index not in self._by_source:
                raise UserError(f"{', '.join(str(files.folder) for files in folders)}: the teacher has not "
                                f"read source {source.name!r} of {source.artifact}; let `megatron-sov "
                                "distill states` read it, and name its folder by --states too")
        told = {source.name: self._by_source[index].teacher for index, source in enumerate(sources)}
        first = folders[0].teacher
        self.teacher = first if {*told.values()} <= {first} else ", ".join(
            f"{name}: {digest}" for name, digest in told.items())
        self.divergence = Divergence(asked.beta, asked.temperature)
        self._asked = asked
        # several folders of a teacher have one head; its states are numbers of one kind in each
        self._kinds = list({(f.teacher, f.dtype): f for f in folders}.values())
        kinds = [(f.teacher, f.dtype) for f in self._kinds]
        self._kind_of = {index: kinds.index((f.teacher, f.dtype)) for index, f in self._by_source.items()}
        self._heads: dict[int, torch.Tensor] = {}

    def verify(self, world: ParallelWorld) -> None:
        """As `RunTeacher.verify`: look at every file that is kept, each on one process."""
        folders = sorted({files.folder for files in self._by_source.values()})
        files = [(folder / name, record) for folder in folders
                 for name, record in read_manifest(folder).files.items()]
        # A checksum reads the whole file, so each process takes its share; then all name the same one.
        own = range(world.rank, len(files), world.size)
        damaged = next((i + 1 for i in own if file_damage(*files[i])), 0)
        for number in collectives.of_all_ranks(float(damaged)):
            if number:
                raise UserError(f"{file_damage(*files[int(number) - 1])}; make the states again with "
                                "`megatron-sov distill states`")

    def read(self, batches: Sequence[MicroBatch]) -> tuple[MicroBatch, ...]:
        """As `RunTeacher.read`: it has read them."""
        return tuple(batches)

    def at(self, batch: MicroBatch, head: Head, split: str = "train") -> Teacher:
        """As `RunTeacher.at`."""
        pieces = context.pieces(len(batch.labels))
        if self._asked.top_k:
            ids, logprobs = unpacked(self._rows(batch.origins, pieces, split))
            # Above 0 the teacher says nothing: `heard` gives no weight, and 0 keeps it finite.
            return TeacherTopK(ids, logprobs.where(logprobs[:, :1] <= 0, 0.0), self._asked.keep_remainder)
        found = sorted({self._kind_of[source] for _, source, _ in batch.origins}) or [0]
        teachers = [TeacherStates(self._rows(batch.origins, pieces, split, kind), self._head(kind, head),
                                  self._kinds[kind].logits_softcap) for kind in found]
        if len(found) == 1:
            return teachers[0]
        # padding has no weight, whoever speaks of it
        owners = torch.zeros(sum(end - first for first, end in pieces), dtype=torch.int64)
        for here, source, _, _, _ in _shared(batch.origins, pieces):
            owners[here] = found.index(self._kind_of[source])
        return SeveralTeachers(owners, teachers)

    def heard(self, batch: MicroBatch, split: str = "train") -> torch.Tensor:
        """As `RunTeacher.heard`: nothing where its tokens do not begin with the student's."""
        if not self._asked.other_tokenizer:
            return batch.weights
        rows = self._rows(batch.origins, [(0, len(batch.labels))], split)
        says = unpacked(rows)[1][:, 0] <= 0
        return batch.weights * to_device(says, batch.weights.device)

    def _rows(self, origins: tuple[RowOrigin, ...], pieces: Sequence[tuple[int, int]], split: str,
              kind: int = 0) -> torch.Tensor:
        """Return [n, width] what is kept of the n tokens of some pieces of a row; of padding, and of tokens
        of another teacher, something that can be computed with, and has no weight."""
        files, top_k = self._kinds[kind], self._asked.top_k
        rows = torch.zeros(sum(end - first for first, end in pieces), files.width, dtype=files.dtype)
        if top_k:
            rows[:, :top_k] = torch.arange(top_k)  # distinct ids, each of log-probability 0
        for here, source, document, start, count in _shared(origins, pieces):
            # most probable tokens are of one shape, whoever found them
            if top_k or self._kind_of[source] == kind:
                rows[here] = self._by_source[source].states(source, split, document, start, count)
        return rows

    def _head(self, kind: int, head: Head) -> torch.Tensor:
        """Return [V / tp, H'] a teacher's rows of the token ids that the student's head has here, in its
        dtype; read once, and only on the last stage, which alone asks."""
        if kind not in self._heads:
            held, files = head.token_ids, self._kinds[kind]
            weight = head.weight.new_zeros(len(head.weight), files.hidden_size)
            if held:
                with safe_open(files.head, "pt") as file:
                    # The slice alone is read; padding rows of the student's head stay 0.
                    weight[:len(held)] = file.get_slice(HEAD_WEIGHT)[held.start:held.stop].to(weight)
            self._heads[kind] = weight
        return self._heads[kind]


def _shared(origins: tuple[RowOrigin, ...], pieces: Sequence[tuple[int, int]]
            ) -> Iterator[tuple[slice, int, int, int, int]]:
    """Yield what pieces of a row, cut for context parallelism, have in common with its documents: the place
    among the tokens of all pieces; and source, document, first token and their number."""
    at = 0
    for first, end in pieces:
        for begins, source, (document, start, count) in origins:
            begin, stop = max(first, begins), min(end, begins + count)
            if begin < stop:
                yield (slice(at + begin - first, at + stop - first), source, document, start + begin - begins,
                       stop - begin)
        at += end - first


class LiveTeacher:
    """A teacher beside the student: a second model on the same processes, at the student's layout, which
    reads each batch just before the student learns it.

    The library's process groups are one per process, so a teacher at a layout of its own is another job
    (`teacher`).  Nothing is kept on disk: whoever resumes has the same teacher read the same batch.
    """

    def __init__(self, checkpoint: Path, config: RunConfig, num_ranks: int) -> None:
        """Check that it can be learned from.

        Args:
            checkpoint: the teacher's.
            config: of the run.
            num_ranks: its processes.

        Raises:
            UserError: it knows other token ids, reads shorter rows, or does not fit the run's layout.
        """
        asked, theirs = config.distillation, read_checkpoint_settings(checkpoint)
        self.teacher = weights_digest(Target(checkpoint, False))
        self.divergence = Divergence(asked.beta, asked.temperature)
        self._path, self._asked = checkpoint, asked
        # what of a layout is about experts, or about layers one by one, is the student's own
        alone: dict[str, Any] = {} if theirs.model.num_experts else {"ep": 1, "etp": 1}
        if theirs.model.num_layers != config.model.num_layers:
            alone["pipeline_layout"] = ()
        self._config = dataclasses.replace(config, model=theirs.model, lora=theirs.lora,
                                           parallel=dataclasses.replace(config.parallel, **alone))
        if asked.other_tokenizer:
            raise UserError("distillation.other_tokenizer = True: a teacher of another tokenizer reads whole "
                            "documents; have `megatron-sov distill` learn from it, or choose one of the same")
        if theirs.model.vocab_size != config.model.vocab_size:
            raise UserError(f"--teacher {checkpoint}: has {theirs.model.vocab_size} token ids, the student "
                            f"model.vocab_size = {config.model.vocab_size}; choose a teacher with as many")
        if asked.top_k >= theirs.model.vocab_size:
            raise UserError(f"distillation.top_k = {asked.top_k}: must be below the "
                            f"{theirs.model.vocab_size} token ids; set it to less, or to 0")
        if config.data.max_seq_len() > theirs.model.max_position_tokens:
            raise UserError(f"--teacher {checkpoint}: reads {theirs.model.max_position_tokens} tokens, and a "
                            f"row has up to {config.data.max_seq_len()}; choose another one, or shorter rows")
        if problems := self._config.parallel.problems(self._config.model, num_ranks):
            raise SettingsError(f"--teacher {checkpoint}: runs at the layout of the student", problems)
        self._model: ForwardModel | None = None

    def verify(self, world: ParallelWorld) -> None:
        """Load it; called by all processes together.

        Raises:
            UserError: a file of it is damaged.
        """
        self._model = load_forward_model(self._path, self._config)

    def read(self, batches: Sequence[MicroBatch]) -> tuple[MicroBatch, ...]:
        """Return micro-batches with what it says of them; called by all processes together."""
        model, top_k = self._model, self._asked.top_k
        assert model is not None, "is not loaded"

        def rows(hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
            if not top_k:
                return whole_states(hidden[0], model)
            ids, logprobs = head.most_probable(hidden[0], top_k, self.divergence.temperature)
            return torch.cat([ids.to(logprobs.dtype), logprobs], 1)

        # routes that are replayed are the student's
        read = [dataclasses.replace(b, inputs=dataclasses.replace(b.inputs, routes=None)) for b in batches]
        said = model.map(read, rows)
        # only the last stage compares
        return tuple(dataclasses.replace(batch, said=found)
                     for batch, found in zip(batches, said, strict=True)) if said else tuple(batches)

    def at(self, batch: MicroBatch, head: Head, split: str = "train") -> Teacher:
        """As `RunTeacher.at`."""
        assert batch.said is not None and self._model is not None, "it has not read the micro-batch"
        said = context.local(batch.said)
        if top_k := self._asked.top_k:
            return TeacherTopK(said[:, :top_k].long(), said[:, top_k:], self._asked.keep_remainder)
        weight = head_of(self._model.model, self._model.head_chunk_tokens).weight
        return TeacherStates(said, weight, self._config.model.logits_softcap)

    def heard(self, batch: MicroBatch, split: str = "train") -> torch.Tensor:
        """As `RunTeacher.heard`: all of it."""
        return batch.weights


def refuse_other_kept(files: StateFiles, asked: DistillationConfig, vocab_size: int) -> None:
    """Raise `UserError` where something else of the teacher was kept, or it knows other token ids."""
    kept = files.kept
    if kept.top_k != asked.top_k:
        raise UserError(f"{files.folder}: holds {_words_of(kept.top_k)} of the teacher, and "
                        f"distillation.top_k = {asked.top_k} asks for {_words_of(asked.top_k)}; set it to "
                        f"{kept.top_k}, or name another folder")
    if kept.translated != asked.other_tokenizer:
        raise UserError(f"{files.folder}: holds {'the student' if kept.translated else 'the teacher'}'s own "
                        f"tokens, and distillation.other_tokenizer = {asked.other_tokenizer}; set it to "
                        f"{kept.translated}, or name another folder")
    if kept.top_k and kept.temperature != asked.temperature:
        raise UserError(f"{files.folder}: its log-probabilities are those at temperature {kept.temperature}, "
                        f"and distillation.temperature = {asked.temperature}; set it to that, or name "
                        "another folder")
    if kept.translated:
        if files.vocab_size > vocab_size:
            raise UserError(f"{files.folder}: its tokens are those of a tokenizer of {files.vocab_size} ids, "
                            f"the student has model.vocab_size = {vocab_size}; set it, or read other data")
    elif files.vocab_size != vocab_size:
        raise UserError(f"{files.folder}: its teacher has {files.vocab_size} token ids, the student "
                        f"model.vocab_size = {vocab_size}; choose a teacher with as many")


def _words_of(top_k: int) -> str:
    return f"the {top_k} most probable tokens" if top_k else "the final hidden states"


DIVERGENCE, CROSS_ENTROPY = "divergence", "cross_entropy"
SPLIT = "heldout"


class Distillation(DataObjective):
    """``(divergence(teacher, student) + ce_coeff * CE) / learned tokens`` (+ multi-token prediction, which
    learns the data's tokens by cross-entropy)."""

    meters = ("kl", "entropy")
    headline = (Meter("kl", "KL to the teacher", "nats", "lower", heldout="heldout_divergence.kl"),)

    def __init__(self, context: ObjectiveContext) -> None:
        """Begin.

        Args:
            context: the run's; its teacher has read the run's sources, in their order.

        Raises:
            UserError: a file of what is kept of the teacher is damaged.
        """
        super().__init__(context)
        teacher: RunTeacher = context.teacher
        teacher.verify(context.world)
        self._teacher = teacher
        self.coefficients = {DIVERGENCE: 1.0}
        if context.config.distillation.ce_coeff > 0:
            self.coefficients[CROSS_ENTROPY] = context.config.distillation.ce_coeff
        self.coefficients |= self._mtp_coefficient

    def collect(self, policy: Any, step: int) -> GlobalBatch:
        """Return the next batch of the data order, which the teacher has read."""
        batch = super().collect(policy, step)
        return dataclasses.replace(batch, micro_batches=self._teacher.read(batch.micro_batches))

    def prepare(self, batch: GlobalBatch) -> GlobalBatch:
        """Count the learned tokens of the global batch."""
        hosts = [m.host for m in batch.micro_batches]
        # Two denominators: the teacher may be silent at labels that cross-entropy learns.
        targets = {DIVERGENCE: sum(float(self._teacher.heard(m).double().sum()) for m in hosts)}
        if CROSS_ENTROPY in self.coefficients:
            targets[CROSS_ENTROPY] = sum(float(m.weights.double().sum()) for m in hosts)
        return with_denominators(batch, targets | self._mtp_targets(hosts))

    def loss(self, hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> LossSums:
        """Return the summed divergence of the learned labels, and their cross-entropy where it is asked."""
        heard = self._teacher.heard(batch)
        terms, measured = head.divergence(hidden[0], self._teacher.at(batch, head), {DIVERGENCE: heard},
                                          self._teacher.divergence)
        if CROSS_ENTROPY in self.coefficients:
            terms |= head.cross_entropy(hidden[0], batch.labels, {CROSS_ENTROPY: batch.weights})[0]
        terms |= self._mtp_sum(hidden, head, batch)
        learned = (heard > 0).double()
        return LossSums(
            terms, per_source(measured.divergence, heard, batch.sources, self._num_sources),
            meters={name: ((getattr(measured, name) * learned).sum(), learned.sum()) for name in self.meters})

    def state(self) -> dict[str, str]:
        return {"teacher": self._teacher.teacher}

    def restore(self, state: dict[str, str]) -> None:
        """Refuse to go on with another teacher.

        Raises:
            UserError: it is another.
        """
        # A resumed run with another teacher would have one loss curve and two targets.
        if state["teacher"] != self._teacher.teacher:
            raise UserError(f"--teacher: is {self._teacher.teacher}, and the run has learned from "
                            f"{state['teacher']} so far; resume with that one, or start a new --run --from "
                            "its checkpoint")


class OnPolicyDistillation(Distillation):
    """The same of rounds that the student writes, and of data in their place (GKD, arXiv 2306.13649)."""

    formats = (ROLLOUTS, *TEXTS)


@dataclasses.dataclass(frozen=True)
class TaughtFactory:
    """Makes an objective that finds a teacher in its context."""

    made: Callable[[ObjectiveContext], Any]
    """Makes it."""
    teachers: Sequence[RunTeacher]
    """The teacher; empty: the run is complete, and nothing is made."""

    @property
    def formats(self) -> tuple[str, ...]:
        return formats_of(self.made)

    @property
    def columns(self) -> Mapping[str, NeededColumn]:
        return columns_of(self.made)

    def __call__(self, context: ObjectiveContext) -> Any:
        return self.made(dataclasses.replace(context, teacher=self.teachers[0]))


def measure_heldout(view: GateView, sources: Sequence[Source],
                    teacher: RunTeacher) -> dict[str, dict[str, float]]:
    """Measure each source that has held-out documents, and record it; called by all processes together.

    Args:
        view: the run.
        sources: those that it reads, in their order.
        teacher: theirs; where it is kept, with held-out documents.

    Returns:
        Source -> `tokens`, those that are learned of up to `data.heldout_tokens`, and means over them:
        `divergence`, the one that is learned, and `kl`, KL(teacher || student) in nats.
    """
    found = {}
    for index, source in enumerate(sources):
        if source.num_tokens.get(SPLIT, 0) > 1:
            tokens, divergence, kl = _sums(view, index, source, teacher).tolist()
            if tokens:
                found[source.name] = {"tokens": int(tokens), "divergence": divergence / tokens,
                                      "kl": kl / tokens}
                view.events.write("heldout_divergence", step=view.step, source=source.name,
                                  **found[source.name])
    return found


def measure_teacher(view: GateView, sources: Sequence[Source], teacher: RunTeacher | None) -> dict[str, Any]:
    """Return what a completion manifest says of a teacher, and how far the student is from it, see
    `measure_heldout`; nothing where there is none."""
    return {} if teacher is None else {
        "teacher": teacher.teacher, "heldout_divergence": measure_heldout(view, sources, teacher)}


def _sums(view: GateView, index: int, source: Source, teacher: RunTeacher) -> torch.Tensor:
    """Return [3] float64, on every process: learned tokens, and sums of divergence and KL over them."""
    config, world, shard = view.config, view.world, source.shard(SPLIT)
    seq_len, size = config.data.max_seq_len(), config.train.micro_batch_size
    samples = heldout_samples(shard, index, seq_len, config.data.heldout_tokens)
    # Every process passes as many batches, since they may share experts; empty rows weigh nothing.
    samples += [OrderedSample(index, ())] * (-len(samples) % (size * world.dp_size))
    own = [from_row(join_rows([sample_row(s, shard, seq_len) for s in samples[i:i + size]]))
           for i in range(world.dp_rank * size, len(samples), size * world.dp_size)]

    def sums(hidden: list[torch.Tensor], head: Head, batch: MicroBatch) -> torch.Tensor:
        _, measured = head.divergence(hidden[0], teacher.at(batch, head, SPLIT), {}, teacher.divergence)
        learned = (teacher.heard(batch, SPLIT) > 0).double()
        return torch.stack([learned.sum(), (measured.divergence * learned).sum(),
                            (measured.kl * learned).sum()])

    parts = view.policy.map(teacher.read(own), sums)
    local = torch.stack(parts).sum(0).cpu() if parts else torch.zeros(3, dtype=torch.float64)
    return collectives.broadcast_from_last_stage(collectives.all_reduce_dp(local))
