"""Every setting of a training run, as frozen dataclasses.

`RunConfig.problems()` lists everything that is wrong at once and changes nothing.  Nothing here imports torch.
Types are checked and converted by pydantic when a config is read from JSON or changed by `--set key=value`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_sov.errors import UserError, nearest

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class YarnConfig:
    """YaRN rotary scaling (arXiv 2309.00071), with the field's names and meaning in transformers."""

    __pydantic_config__ = STRICT
    factor: float = 2.0
    """How many times longer than the original the context becomes."""
    original_max_position_tokens: int = 65536
    """Context length, in tokens, before scaling."""
    beta_fast: float = 32.0
    """Rotations within the original context above which a dimension is left alone."""
    beta_slow: float = 1.0
    """Rotations within the original context below which a dimension is fully interpolated."""


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a model; `family` says how it maps to Hugging Face (see `megatron_sov/models`)."""

    __pydantic_config__ = STRICT
    family: str
    """Name of the family's declaration in `megatron_sov/models`, equal to transformers' `model_type`."""
    vocab_size: int
    """Number of token ids, including reserved ones."""
    hidden_size: int
    """Width of the residual stream."""
    num_layers: int
    """Transformer layers of the trunk (multi-token prediction layers not counted)."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads (grouped-query attention)."""
    head_dim: int
    """Width of one head."""
    num_dense_layers: int = 0
    """Leading layers with a dense feed-forward network instead of experts."""
    dense_ffn_dim: int = 0
    """Inner width of dense feed-forward layers (also of a dense multi-token prediction layer)."""
    num_experts: int = 128
    """Routed experts of a layer."""
    num_experts_per_token: int = 8
    """Routed experts that each token visits (top-k)."""
    num_shared_experts: int = 1
    """Experts that every token visits."""
    expert_ffn_dim: int = 1280
    """Inner width of one expert."""
    routed_scaling_factor: float = 1.0
    """Factor on the normalised weights of the chosen experts."""
    router_bias_update_rate: float = 1e-3
    """Step of the router's selection bias per optimizer step (arXiv 2408.15664); 0 freezes it."""
    seq_aux_loss_coeff: float = 1e-4
    """Weight of the sequence-level load-balancing loss (DeepSeek-V3, arXiv 2412.19437, eq. 17)."""
    attention_pattern: str = "G"
    """Repeating pattern of layers: L = sliding window, G = global."""
    sliding_window_tokens: int = 0
    """Window of L layers, in tokens, the current one included; 0 where the pattern has no L."""
    rope_on_global: bool = True
    """Whether global layers rotate queries and keys; False = NoPE."""
    rope_theta: float = 1e6
    """Base of the rotary frequencies."""
    yarn: YarnConfig | None = None
    """Rotary scaling beyond the original context; None = plain RoPE."""
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys, before RoPE."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    num_mtp_layers: int = 0
    """Multi-token prediction layers after the trunk (DeepSeek-V3 form, dense)."""
    mtp_loss_coeff: float = 0.05
    """Weight of the multi-token prediction loss."""
    max_position_tokens: int = 131072
    """Longest context the model claims, in tokens."""
    init_std: float = 0.02
    """Standard deviation of initial weights; matrices that write to the residual get it / sqrt(2 * num_layers)."""

    def layer_types(self) -> list[Literal["sliding_attention", "full_attention"]]:
        """Return the attention type of each trunk layer."""
        pattern = self.attention_pattern or "G"
        return ["sliding_attention" if pattern[i % len(pattern)] == "L" else "full_attention" for i in range(self.num_layers)]

    def problems(self) -> list[str]:
        """Return one sentence for each rule that the architecture breaks."""
        p = []
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) <= 0:
                p.append(f"model.{name} = {getattr(self, name)} must be positive")
        if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
            p.append(f"model.num_kv_heads = {self.num_kv_heads} must divide model.num_heads = {self.num_heads}")
        if self.head_dim % 2:
            p.append(f"model.head_dim = {self.head_dim} must be even (RoPE rotates pairs)")
        if not 0 <= self.num_dense_layers <= self.num_layers:
            p.append(f"model.num_dense_layers = {self.num_dense_layers} must lie between 0 and num_layers = {self.num_layers}")
        if (self.num_dense_layers or self.num_mtp_layers) and self.dense_ffn_dim <= 0:
            p.append(f"model.dense_ffn_dim = {self.dense_ffn_dim} must be positive for dense and multi-token prediction layers")
        if self.num_dense_layers < self.num_layers and not 0 < self.num_experts_per_token <= self.num_experts:
            p.append(f"model.num_experts_per_token = {self.num_experts_per_token} must lie between 1 and "
                     f"num_experts = {self.num_experts}")
        if set(self.attention_pattern) - {"L", "G"} or not self.attention_pattern:
            p.append(f"model.attention_pattern = {self.attention_pattern!r} may hold only the letters L and G")
        if ("L" in self.attention_pattern) != (self.sliding_window_tokens > 0):
            p.append(f"model.sliding_window_tokens = {self.sliding_window_tokens} must be positive exactly when "
                     f"attention_pattern = {self.attention_pattern!r} has an L")
        if self.num_mtp_layers not in (0, 1):
            p.append(f"model.num_mtp_layers = {self.num_mtp_layers} must be 0 or 1")
        if self.init_std <= 0:
            p.append(f"model.init_std = {self.init_std} must be positive")
        return p


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is laid out over processes; the data parallel size follows from their number."""

    __pydantic_config__ = STRICT
    tp: int = 1
    """Tensor parallel size."""
    sp: bool = False
    """Sequence parallelism: norms and residuals split along the sequence inside a tensor parallel group."""
    pp: int = 1
    """Pipeline parallel size."""
    ep: int = 1
    """Expert parallel size."""
    etp: int = 1
    """Tensor parallel size inside each expert."""

    def problems(self, model: ModelConfig, num_ranks: int) -> list[str]:
        """Return one sentence for each rule that this layout breaks for `model` on `num_ranks` processes."""
        p = []
        sizes = {"tp": self.tp, "pp": self.pp, "ep": self.ep, "etp": self.etp}
        for name, size in sizes.items():
            if size < 1:
                p.append(f"parallel.{name} = {size} must be at least 1")
        if p:
            return p
        for name in ("num_heads", "num_kv_heads", "vocab_size"):
            value = getattr(model, name)
            if value % self.tp:
                p.append(f"parallel.tp = {self.tp} must divide model.{name} = {value}; {_divisors(value)}")
        if model.num_dense_layers and model.dense_ffn_dim % self.tp:
            p.append(f"parallel.tp = {self.tp} must divide model.dense_ffn_dim = {model.dense_ffn_dim}")
        if model.num_dense_layers < model.num_layers:
            if model.num_experts % self.ep:
                p.append(f"parallel.ep = {self.ep} must divide model.num_experts = {model.num_experts}; "
                         f"{_divisors(model.num_experts)}")
            if model.expert_ffn_dim % self.etp:
                p.append(f"parallel.etp = {self.etp} must divide model.expert_ffn_dim = {model.expert_ffn_dim}")
            if self.tp > 1 and not self.sp:
                p.append(f"parallel.sp = {self.sp} must be true when experts meet parallel.tp = {self.tp} > 1")
        if self.sp and self.tp == 1:
            p.append("parallel.sp = True needs parallel.tp > 1; leave it out or raise tp")
        if model.num_layers % self.pp:
            p.append(f"parallel.pp = {self.pp} must divide model.num_layers = {model.num_layers}; {_divisors(model.num_layers)}")
        for names in (("tp", "pp"), ("etp", "ep", "pp")):
            size = 1
            for name in names:
                size *= sizes[name]
            if num_ranks % size:
                product = " x ".join(f"{n} {sizes[n]}" for n in names)
                p.append(f"parallel {product} = {size} must divide the number of processes, {num_ranks}; "
                         f"start a multiple of {size} (--nproc) or lower one of them")
        return p


@dataclass(frozen=True)
class PhaseConfig:
    """One phase of a curriculum: from which step on which sources are mixed, and how long the samples are."""

    __pydantic_config__ = STRICT
    name: str
    """Name of the phase in events and in the report."""
    share: float = 1.0
    """Part of the run's steps that belong to this phase; the shares of all phases are normalised."""
    blend: dict[str, float] = field(default_factory=dict)
    """Source name -> weight (normalised); empty: every source in proportion to its tokens and its --data weight."""
    seq_len: int = 4096
    """Tokens of one sample."""


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how documents become samples."""

    __pydantic_config__ = STRICT
    paths: dict[str, float] = field(default_factory=dict)
    """Token shard artifacts (`sov-data pack`) -> weight; given by --data DIR[:weight]."""
    packing: Literal["concat", "whole"] = "concat"
    """concat: documents follow one another and are cut at the sample's end; whole: no document is cut unless it is
    longer than a sample, the rest is padding."""
    phases: tuple[PhaseConfig, ...] = (PhaseConfig("main"),)
    """The curriculum, in order."""
    heldout_tokens: int = 65536
    """Held-out tokens of each source that an evaluation reads at most."""
    text_share: float = 0.0
    """For SFT: part of each batch that is plain text, learned by the auxiliary term (0: none)."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate schedule."""

    __pydantic_config__ = STRICT
    lr: float = 2.5e-4
    """Peak learning rate."""
    min_lr: float = 3e-6
    """Learning rate at the end of the decay."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine: warm-up, cosine decay; wsd: warm-up, stable, linear decay over the last `decay_share`; constant."""
    warmup_steps: int = 2000
    """Optimizer steps of linear warm-up."""
    decay_share: float = 0.2
    """wsd only: last part of the run over which the rate decays."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices (not on norms and biases)."""
    beta1: float = 0.9
    """AdamW's first moment decay."""
    beta2: float = 0.95
    """AdamW's second moment decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how large, how often."""

    __pydantic_config__ = STRICT
    steps: int = 0
    """Optimizer steps; 0: as many as `tokens` needs."""
    tokens: int = 0
    """Token budget of the run; used when `steps` is 0."""
    global_batch_size: int = 512
    """Samples of one optimizer step, over all processes."""
    micro_batch_size: int = 1
    """Samples of one forward pass on one process."""
    seed: int = 1234
    """Seed of initial weights, data order and dropout."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Dtype of weights and activations; bf16 keeps fp32 master weights and reduces gradients in fp32."""
    recompute: bool = False
    """Recompute every layer's activations in the backward pass instead of storing them."""
    head_chunk_tokens: int = 2048
    """Tokens whose logits exist at a time; the output head runs in chunks of this many."""
    checkpoint_every_steps: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay; 0 keeps all."""
    eval_every_steps: int = 500
    """Steps between evaluations on held-out documents; 0: only at the end."""
    log_every_steps: int = 1
    """Steps between `step` events."""
    num_threads: int = 0
    """CPU threads of each process; 0: cores divided by local processes."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is learned, and the weights of its terms."""

    __pydantic_config__ = STRICT
    name: Literal["lm", "sft"] = "lm"
    """lm: next-token cross-entropy (with multi-token prediction where the model has it); sft: cross-entropy on responses."""
    text_coeff: float = 0.0
    """sft: weight of an auxiliary cross-entropy on plain text, normalised over its own tokens."""


@dataclass(frozen=True)
class NeedleConfig:
    """The needle-in-a-haystack suite that judges a longer context."""

    __pydantic_config__ = STRICT
    lengths_tokens: tuple[int, ...] = (4096, 8192)
    """Context lengths to test."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.95)
    """Where the needle stands, 0 = start."""
    samples: int = 20
    """Samples of one cell (depth x length)."""
    train_share: float = 0.1
    """Part of the extension's samples that are synthetic retrieval documents, with other keys and values than the test's."""


@dataclass(frozen=True)
class ObsConfig:
    """Where a run is watched, besides events.jsonl and the progress bar."""

    __pydantic_config__ = STRICT
    tensorboard: bool = False
    """Write TensorBoard files into RUN/tensorboard (extra `dev`)."""
    wandb: bool = False
    """Log to Weights & Biases; works offline with WANDB_MODE=offline (extra `dev`)."""
    wandb_project: str = "megatron-sov"
    """Weights & Biases project."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of one stage of training; saved resolved as RUN/config.json."""

    __pydantic_config__ = STRICT
    recipe: str
    """Name of the recipe that it came from."""
    model: ModelConfig
    """The architecture."""
    parallel: ParallelConfig = ParallelConfig()
    """The layout."""
    data: DataConfig = DataConfig()
    """Sources, curriculum, packing."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    train: TrainConfig = TrainConfig()
    """The loop."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is learned."""
    needle: NeedleConfig = NeedleConfig()
    """The needle suite of `extend`."""
    obs: ObsConfig = ObsConfig()
    """Trackers."""

    def problems(self, num_ranks: int = 1) -> list[str]:
        """Return one sentence for every rule that this config breaks on `num_ranks` processes; empty when it is sound."""
        p = self.model.problems()
        p += self.parallel.problems(self.model, num_ranks)
        p += self._phase_problems() + self._number_problems()
        return p + ([] if p else self._batch_problems(num_ranks))

    def _phase_problems(self) -> list[str]:
        p = []
        if not self.data.phases:
            p.append("data.phases = () must hold at least one phase")
        for i, phase in enumerate(self.data.phases):
            where = f"data.phases.{i} ({phase.name})"
            if phase.share <= 0:
                p.append(f"{where}.share = {phase.share} must be positive")
            if phase.seq_len < 2:
                p.append(f"{where}.seq_len = {phase.seq_len} must be at least 2")
            elif self.parallel.tp > 1 and phase.seq_len % self.parallel.tp:
                p.append(f"{where}.seq_len = {phase.seq_len} must be a multiple of parallel.tp = {self.parallel.tp}")
            if phase.seq_len > self.model.max_position_tokens:
                p.append(f"{where}.seq_len = {phase.seq_len} exceeds model.max_position_tokens = {self.model.max_position_tokens}")
            for source, weight in phase.blend.items():
                if weight < 0:
                    p.append(f"{where}.blend.{source} = {weight} must not be negative")
            if phase.blend and not sum(phase.blend.values()) > 0:
                p.append(f"{where}.blend has only zero weights; give at least one source a weight")
        return p

    def _number_problems(self) -> list[str]:
        p = []
        o, t = self.optim, self.train
        rules = [
            (t.steps >= 0, f"train.steps = {t.steps} must not be negative"),
            (t.steps > 0 or t.tokens > 0, "train.steps = 0 needs a token budget; set train.steps or train.tokens"),
            (t.global_batch_size > 0, f"train.global_batch_size = {t.global_batch_size} must be positive"),
            (t.micro_batch_size > 0, f"train.micro_batch_size = {t.micro_batch_size} must be positive"),
            (t.head_chunk_tokens > 0, f"train.head_chunk_tokens = {t.head_chunk_tokens} must be positive"),
            (t.checkpoint_every_steps > 0, f"train.checkpoint_every_steps = {t.checkpoint_every_steps} must be positive"),
            (t.log_every_steps > 0, f"train.log_every_steps = {t.log_every_steps} must be positive"),
            (0 <= o.min_lr <= o.lr, f"optim.min_lr = {o.min_lr} must lie between 0 and optim.lr = {o.lr}"),
            (o.lr > 0, f"optim.lr = {o.lr} must be positive"),
            (0 < o.decay_share <= 1, f"optim.decay_share = {o.decay_share} must lie in (0, 1]"),
            (0 <= self.data.text_share < 1, f"data.text_share = {self.data.text_share} must lie in [0, 1)"),
        ]
        p += [sentence for holds, sentence in rules if not holds]
        return p

    def _batch_problems(self, num_ranks: int) -> list[str]:
        t = self.train
        dp = num_ranks // (self.parallel.tp * self.parallel.pp)
        if t.global_batch_size % (t.micro_batch_size * dp):
            return [f"train.global_batch_size = {t.global_batch_size} must be a multiple of micro_batch_size "
                    f"{t.micro_batch_size} x data parallel size {dp} = {t.micro_batch_size * dp}"]
        return []

    def check(self, num_ranks: int = 1) -> None:
        """Raise `UserError` listing every problem, if there is any."""
        problems = self.problems(num_ranks)
        if problems:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise UserError(f"recipe {self.recipe}: {count}\n" + "\n".join(f"  {p}" for p in problems))

    def num_steps(self) -> int:
        """Return the run's optimizer steps, from `train.steps` or else the token budget."""
        if self.train.steps:
            return self.train.steps
        total_share = sum(p.share for p in self.data.phases)
        mean_len = sum(p.share * p.seq_len for p in self.data.phases) / total_share
        return max(1, round(self.train.tokens / (self.train.global_batch_size * mean_len)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` gives back an equal config."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _divisors(n: int) -> str:
    found = [d for d in range(1, min(n, 129)) if n % d == 0]
    return "use one of " + ", ".join(map(str, found))


def from_dict(raw: dict[str, Any]) -> RunConfig:
    """Build a `RunConfig` from plain values.

    Raises:
        UserError: unknown fields (with the nearest known one) and values of the wrong type, all at once.
    """
    try:
        return TypeAdapter(RunConfig).validate_python(raw)
    except ValidationError as e:
        lines = [_explain(error) for error in e.errors()]
        raise UserError("config: " + f"{len(lines)} problem{'s' if len(lines) > 1 else ''}\n" + "\n".join(f"  {x}" for x in lines)) from None


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}: no such setting{nearest(str(error['loc'][-1]), _fields_at(error['loc'][:-1]))}"
    return f"{where} = {error.get('input')!r}: {error['msg']}"


def _fields_at(path: tuple[Any, ...]) -> list[str]:
    """Return the field names of the config class that stands at a path, e.g. ("model", "yarn")."""
    cls: Any = RunConfig
    for part in path:
        if isinstance(part, int) or not dataclasses.is_dataclass(cls):
            continue
        hint = get_type_hints(cls).get(part)
        options = [hint, *get_args(hint)]
        cls = next((o for o in options if dataclasses.is_dataclass(o)), None)
        if cls is None:
            return []
    return [f.name for f in dataclasses.fields(cls)]


def apply_settings(config: RunConfig, settings: list[str]) -> RunConfig:
    """Return the config with `key=value` settings applied, e.g. ``train.steps=100`` or ``data.phases.0.seq_len=512``.

    Values are read as JSON where they parse (`true`, `1e-4`, `{"en": 1}`, `null`), else as text, then converted to the
    field's type.

    Raises:
        UserError: a key that does not exist (with the nearest), a malformed setting or a value of the wrong type.
    """
    raw = config.to_dict()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UserError(f"--set {setting!r}: must have the form key=value, e.g. --set train.steps=100")
        _assign(raw, key.split("."), _parse(text), setting)
    return from_dict(raw)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _assign(raw: Any, parts: list[str], value: Any, setting: str) -> None:
    cls: Any = RunConfig
    node = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"--set {setting!r}: {'.'.join(parts[:depth])} has items 0 to {len(node) - 1}, not {part!r}")
            index: Any = int(part)
        else:
            known = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else None
            if known is not None and part not in known:
                raise UserError(f"--set {setting!r}: '{'.'.join(parts[:depth + 1])}' does not exist{nearest(part, known)}")
            index = part
        cls = _class_below(cls, part)
        if last:
            node[index] = value
        else:
            child = node[index] if isinstance(node, list) else node.get(index)
            if child is None:
                child = node[index] = {}
            node = child
            if not isinstance(node, (dict, list)):
                raise UserError(f"--set {setting!r}: '{'.'.join(parts[:depth + 1])}' is a value and has no fields")


def _class_below(cls: Any, part: str) -> Any:
    """Return the dataclass (or container's item class) that a field holds, or None for plain values."""
    if dataclasses.is_dataclass(cls):
        hint = get_type_hints(cls).get(part)
    elif get_origin(cls) in (tuple, list):
        hint = get_args(cls)[0]
    else:
        return None
    if get_origin(hint) in (tuple, list):
        return hint
    return next((o for o in (hint, *get_args(hint)) if dataclasses.is_dataclass(o)), None)
