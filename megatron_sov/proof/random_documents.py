"""Write random training data for a proof: documents with every column for `BUILT_IN_OBJECTIVES`, and a
random teacher."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_sov.base.artifacts import create_artifact
from megatron_sov.base.documents.shard_files import CONTENT_VERSION, IndexedWriter, build_source_record
from megatron_sov.chat.encode import TYPE_PROMPT, TYPE_RESPONSE, TYPE_TEXT
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.model.config import RunConfig
from megatron_sov.post import policy, preference, reference
from megatron_sov.post.distillation.distill import Distillation, StoredTeacher, TeacherFactory
from megatron_sov.post.distillation.state_files import HEAD_WEIGHT, StateFormat, pack_rows
from megatron_sov.post.sft import SupervisedFineTuning
from megatron_sov.train.data.sources import Source
from megatron_sov.train.objectives.data_objective import LanguageModelling

SOURCE = "proof"
NUM_DOCUMENTS = 600
TOKEN_COLUMNS = (reference.COLUMN, policy.BEHAVIOUR, policy.OLD, policy.TEACHER)
"""Columns with a log-probability per token, around `-log(vocab_size)` as for an untrained model."""
SPREAD = 1.5
"""Standard deviation in nats; large enough to clip importance ratios on both sides."""
OLD_SHIFT = 1.0
"""Distance in nats of a document's `old` log-probabilities from those of the model, up or down, so that even
the ratio of a whole response is below or above 1."""
LEARNED_SHARE = 0.75
"""Share of documents whose advantage has the sign that is not clipped. A step has few documents: without any
of these its policy gradient would be 0 in every layout."""
TEACHER_WIDTH = 8
_LONGEST = 41


def select_objective(config: RunConfig, sources: Sequence[Source]) -> Callable[[Any], Any]:
    """Return the factory for a run's objective."""
    name = config.objective.name
    if name == "distill":
        return TeacherFactory(Distillation, [_RandomTeacher(config, sources)])
    factories: dict[str, Callable[[], Any]] = {
        "lm": lambda: LanguageModelling, "sft": lambda: SupervisedFineTuning,
        "preference": lambda: preference.select_objective(config),
        "policy": lambda: policy.build_policy_objective(config)}
    return factories[name]()


def write_documents(folder: Path, config: RunConfig, seed: int = 0) -> None:
    """Write random documents to `folder` as a token artifact: prompts, responses and, without judged
    documents, plain text."""
    random, vocab_size = np.random.default_rng(seed), config.model.vocab_size
    method = config.preference.method if config.objective.name == "preference" else ""
    are_pairs, is_judged = method not in ("", "grouper"), config.objective.name in ("preference", "policy")
    longest = (15 if are_pairs else _LONGEST) // 3 + 1
    columns = dict.fromkeys((*TOKEN_COLUMNS, policy.ADVANTAGE, preference.GROUP_SHARE), "float32")
    counts = {"num_documents": NUM_DOCUMENTS, "num_tokens": 0, "num_bytes": 0}
    with create_artifact(folder, "tokens") as artifact:
        with IndexedWriter(artifact.path / SOURCE, "uint16",
                           {"loss": "float32", "type": "uint8", **columns}) as writer:
            for num_tokens in 3 * random.integers(1, longest, NUM_DOCUMENTS):  # leaves padding in some rows
                document = _draw_document(random, int(num_tokens), vocab_size, is_judged)
                writer.write(np.array([len(document["bin"])], np.int32), document)
                counts["num_tokens"] += len(document["bin"])
        counts["num_bytes"] = counts["num_tokens"]
        record = build_source_record(SOURCE, "preference" if are_pairs else "chat",
                                     ("loss", "type", *columns), [{"prefix": SOURCE, **counts}])
        artifact.content = {"content_version": CONTENT_VERSION, "tokenizer_sha256": "0" * 64, "vocab_size":
                            vocab_size, "dtype": "uint16", "eod": "none", "bos_id": None, "eos_id": None,
                            "sources": [record | {"group_documents": 2 if are_pairs else 1}]}
        artifact.settings = {"seed": seed}
    save_file({HEAD_WEIGHT: torch.from_numpy(random.normal(size=(vocab_size, TEACHER_WIDTH)))},
              _get_head_path(folder))


def _draw_document(random: np.random.Generator, num_tokens: int, vocab_size: int, is_judged: bool
                   ) -> dict[str, np.ndarray]:
    """Return column -> array [num_tokens]; judged documents are a prompt and a response, others are mixed."""
    if is_judged:
        learned = np.arange(num_tokens) >= max(1, num_tokens // 3)
    else:
        learned = random.random(num_tokens) < 2 / 3
    # each document has prompt and response, or a step with few rows might train on no token
    is_text = random.random(num_tokens) < (0 if is_judged else 0.25)
    types = np.where(learned, np.where(is_text, TYPE_TEXT, TYPE_RESPONSE), TYPE_PROMPT)
    numbers = {name: random.normal(-np.log(vocab_size), SPREAD, num_tokens).astype(np.float32)
               for name in TOKEN_COLUMNS}
    shift = random.choice((-OLD_SHIFT, OLD_SHIFT))
    numbers[policy.OLD] += np.float32(shift)
    # The surrogate is clipped where the ratio is below 1 and the advantage negative, or both the other way.
    is_unclipped = random.random() < LEARNED_SHARE
    advantage = random.random() * np.sign(shift) * (1 if is_unclipped else -1)
    shares = {policy.ADVANTAGE: advantage, preference.GROUP_SHARE: random.random()}
    # close to the trainer, or corrections would mask all tokens
    numbers[policy.BEHAVIOUR] = numbers[policy.OLD] + random.normal(0, 0.02, num_tokens).astype(np.float32)
    return {"bin": random.integers(0, vocab_size, num_tokens), "loss": learned.astype(np.float32),
            "type": types, **numbers,
            **{name: np.full(num_tokens, share, np.float32) for name, share in shares.items()}}


def _get_head_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-teacher.safetensors")


class _RandomTeacher(StoredTeacher):
    """A `StoredTeacher` with random states."""

    def __init__(self, config: RunConfig, sources: Sequence[Source]) -> None:
        settings = config.distillation
        state_format = StateFormat("float32", settings.top_k, settings.temperature)
        [folder] = config.data.paths
        files: Any = SimpleNamespace(
            folder=Path(folder), state_format=state_format, vocab_size=config.model.vocab_size,
            teacher=SOURCE, logits_softcap=None,
            dtype=torch.int32 if settings.top_k else torch.float32, sources={0: 0}, hidden_size=TEACHER_WIDTH,
            width=2 * settings.top_k or TEACHER_WIDTH, head=_get_head_path(Path(folder)),
            read_states=lambda source, split, document, start, count: _draw_states(
                settings.top_k, config.model.vocab_size, document)[start:start + count])
        super().__init__([files], settings, sources, config.model.vocab_size)

    def verify(self, world: ParallelWorld) -> None:
        """No files to verify."""


@functools.lru_cache(maxsize=1024)
def _draw_states(top_k: int, vocab_size: int, document: int) -> torch.Tensor:
    """Return a document's rows, like `StateFiles.read_states`."""
    random = torch.Generator().manual_seed(document)
    if not top_k:
        return torch.randn(_LONGEST, TEACHER_WIDTH, generator=random)
    logprobs, ids = torch.randn(_LONGEST, vocab_size, generator=random).log_softmax(-1).topk(top_k)
    return pack_rows(ids, logprobs)
