"""The seconds of an optimizer step, by component: a roofline with few fitted numbers (docs/plan_speed.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal, NamedTuple

from megatron_sov.plan.speed import traffic
from megatron_sov.plan.speed.parameters import UNITS, Parameters, load_default_parameters
from megatron_sov.plan.speed.traffic import Product
from megatron_sov.plan.speed.workload import HEAD, Block, Workload

EXPERT_STREAMS = 4
"""CUDA streams of Transformer Engine's grouped products."""
HALF = 0.5
"""Recomputed share if every second layer or product is recomputed."""
UPDATE_BYTES = {"adam": 34, "muon": 26}
"""Memory traffic per weight of an update, in bytes: gradient for norm and update, master weight and moments
read and written, new weight."""
OF_LAYERS: tuple[Literal["tp", "ep", "cp"], ...] = ("tp", "ep", "cp")
"""Groups with messages in every layer, so stages with more layers send more."""
NEWTON_SCHULZ = 5 * 6
"""FLOPs of Muon per weight, in units of the matrix's smaller dimension: five iterations of three products
(arXiv 2502.16982)."""


class Clock:
    """Converts FLOPs and bytes of a workload to seconds on the chip (docs/plan_speed.md)."""

    def __init__(self, w: Workload, p: Parameters) -> None:
        self.w, self.p = w, p
        self.family = w.chip.generation
        self.frozen = w.objective == "lora"
        # A chip sold with less power runs its tensor cores slower than the reference of its generation.
        self.throttle = min(1.0, (w.chip.power_w / p.reference_power_w[self.family]) ** p.power_exponent)
        self.age = p.dense_ageing ** w.software_age_years
        self.moe_age = p.moe_ageing ** w.software_age_years
        self.hbm = (w.chip.hbm_bytes_per_s * p.hbm_fraction / self.age
                    / (1.0 if w.fused_kernels else p.unfused_passes))

    def peak(self, quantized: bool) -> float:
        """Return the FLOP/s of large products."""
        unit = UNITS[self.w.precision] if quantized else "bf16"
        if unit == "fp4" and self.w.shape.num_mamba_layers:
            unit = "fp8"  # hybrids keep most products in 8 bits or more (arXiv 2509.25149, section 3)
        return (self.w.chip.flops_per_s(unit) * self.p.product_fraction[self.family][unit] * self.throttle
                / self.age)

    def again(self, part: str) -> float:
        """Return the mean number of recomputations of a part."""
        w = self.w
        if w.recompute == "none" or part == HEAD:
            return 0.0
        if w.recompute == "full" or (part and part in w.recompute_modules):
            return 1.0
        # "layer" and "op": every second layer or product
        return HALF if {"layer", "op"} & set(w.recompute_modules) else 0.0

    def passes(self, part: str, backward: float = 2.0) -> float:
        return 1 + backward + self.again(part)

    def products(self, products: list[Product]) -> float:
        return sum(self.product(one) for one in products)

    def product(self, one: Product) -> float:
        """Return the seconds of a product over all passes; frozen weights need no gradient."""
        w, p = self.w, self.p
        # A saturating curve: a product of depth `product_half_depth` reaches half of the peak.
        peak, launches = self.peak(one.quantized) * one.k / (one.k + p.product_half_depth), 1.0
        if one.part == "moe":
            # Rows of one expert: many small products are slower than a large one of the same FLOPs.
            rows = one.tokens / max(1e-9, one.groups)
            peak *= p.fused_expert_fraction if w.fused_experts else p.expert_fraction
            peak *= rows / (rows + p.expert_half_tokens)
            if not w.fused_experts:  # a product, and where it is quantised a kernel more, for each expert
                launches = max(1.0, one.groups * (1 if w.precision == "bf16" else 2) / EXPERT_STREAMS)
        # Bytes of an operand; what comes out is bf16 in any case.
        size = 1 if one.quantized and w.precision != "bf16" else 2
        passed = (one.tokens * one.k + one.groups * one.n * one.k) * size + 2 * one.tokens * one.n
        # Roofline: the slower of arithmetic and memory, plus the time to fill the chip for each launch.
        once = max(one.flops / peak, passed / self.hbm) + launches * p.product_fill_s
        # The backward pass has two products, one for each operand's gradient; a frozen weight needs one.
        return self.passes(one.part, 1.0 if self.frozen else 2.0) * once

    def attention(self, window: int) -> float:
        w, p = self.w, self.p
        # Attention ends at the window, the document and the row, whichever comes first.
        keys = min(window or w.seq_len, w.document_tokens or w.seq_len, w.seq_len)
        width = w.shape.query_dim
        peak = (w.chip.bf16_flops_per_s * p.attention_fraction[self.family] * self.throttle / self.age
                * width / (width + p.attention_half_width) * keys / (keys + p.attention_half_tokens))
        if w.attention_kernel == "portable":
            peak *= p.attention_portable[self.family]
        once = traffic.count_attention_flops(w, window) / peak + p.product_fill_s
        return self.passes("core_attn", traffic.ATTENTION_BACKWARD) * once

    def scan(self, flops: float, part: str = "mamba") -> float:
        return self.passes(part) * flops / (self.w.chip.bf16_flops_per_s * self.p.scan_fraction)

    def passed(self, num_bytes: float, part: str) -> float:
        """Return the seconds over all passes of kernels with `num_bytes` of traffic per forward pass."""
        return self.passes(part) * num_bytes / self.hbm

    def around(self, products: list[Product]) -> float:
        """Return the seconds for quantizing operands and for adapters."""
        seconds = 0.0
        if self.w.precision != "bf16":
            passes = self.p.quantize_passes[self.w.precision]
            seconds += passes * traffic.count_quantized_bytes(products, self.frozen) / self.hbm
        if self.frozen:
            seconds += self.passed(traffic.count_adapter_bytes(products), "")
        return seconds


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on the slowest pipeline stage; `COMPONENTS` add up to `total_s`."""

    dense_s: float
    """Products of attention, Mamba, dense feed-forward networks and shared experts."""
    experts_s: float
    """Grouped products of routed experts."""
    attention_s: float
    """Attention products; scans of Mamba layers."""
    head_s: float
    memory_s: float
    """Memory-bound kernels: norms, rotation, activations, token permutation, quantization."""
    launch_s: float
    """Waiting for the host to launch kernels."""
    tp_s: float
    """Exposed tensor-parallel messages."""
    ep_s: float
    """Exposed expert messages."""
    cp_s: float
    """Exposed context-parallel messages."""
    pp_s: float
    """Exposed messages between stages."""
    dp_s: float
    """Exposed data-parallel messages."""
    bubble_s: float
    """Pipeline bubble."""
    optimizer_s: float
    other_s: float
    """Fixed overhead per step, and the slowdown of untuned runs."""
    tokens: int
    num_gpus: int
    flops_per_token: float
    """Model FLOPs (`ModelShape.count_train_flops`); two thirds under LoRA."""
    peak_flops_per_s: float

    @property
    def components(self) -> dict[str, float]:
        """Component without its unit suffix -> seconds."""
        return {name.removesuffix("_s"): getattr(self, name) for name in COMPONENTS}

    @property
    def total_s(self) -> float:
        return sum(self.components.values())

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens / self.num_gpus / self.total_s

    @property
    def tflops_per_gpu(self) -> float:
        return self.tokens_per_s_per_gpu * self.flops_per_token / 1e12

    @property
    def mfu(self) -> float:
        return self.tflops_per_gpu * 1e12 / self.peak_flops_per_s


COMPONENTS = tuple(f.name for f in fields(StepTime) if f.name.endswith("_s") and f.name != "peak_flops_per_s")
"""Fields that add up to the step time."""


@dataclass
class _MicroBatch:
    """Seconds of a micro-batch by component."""

    dense: float = 0.0
    experts: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    memory: float = 0.0

    def add(self, other: _MicroBatch, times: float) -> None:
        for name, seconds in vars(other).items():
            setattr(self, name, getattr(self, name) + times * seconds)

    @property
    def total(self) -> float:
        return sum(vars(self).values())


class StepParts(NamedTuple):
    """Seconds of a micro-batch over all pipeline stages."""

    trunk: _MicroBatch
    """Layers without prediction layers."""
    behind: _MicroBatch
    """Prediction layers without heads."""
    head: _MicroBatch
    """Heads of trunk and prediction layers, with losses."""


PartsCache = dict[Workload, StepParts]
"""Cache of `StepParts`, by workloads without pipeline and batch settings."""


def estimate_step(w: Workload, parameters: Parameters | None = None,
                  known: PartsCache | None = None) -> StepTime:
    """Estimate the seconds of a step.

    Args:
        w: workload.
        parameters: speed parameters; None: the package's.
        known: cache for a search, valid for one set of parameters.

    Raises:
        UserError: the chip has no products in the workload's precision.
    """
    p = parameters or load_default_parameters()
    clock, m = Clock(w, p), w.num_micro_batches
    # Messages of a step by group; those of layers and stages are spread evenly over its micro-batches.
    sent = {message.group: message for message in traffic.list_messages(w)}
    average = {group: _estimate_exposed_s(w, p, sent.get(group)) / m for group in ("tp", "ep", "cp", "pp")}
    # The slowest stage sets the pace of the pipeline, and so its own messages count, not the mean's.
    stage, mean, crowded = _find_slowest_stage(w, _estimate_parts(
        clock, known), sum(average[group] for group in OF_LAYERS))
    exposed = {group: spent * (crowded if group in OF_LAYERS else 1) for group, spent in average.items()}
    if w.overlap_ep:
        # messages longer than the micro-batch's computation stay exposed
        whole_s = _estimate_exposed_s(replace(w, overlap_ep=False), p, sent.get("ep")) / m * crowded
        exposed["ep"] = max(exposed["ep"], whole_s - stage.total)
    device = stage.total + sum(exposed.values())
    host, stall = _estimate_launch_s(clock)
    # The host runs ahead: it costs only what the device does not cover, or stalls that nothing covers.
    launch = max(stall, host - device)
    one = device + launch
    # 1F1B idles pp - 1 micro-batches, interleaving divides that by vpp (arXiv 2104.04473, section 2.3).
    bubble = (w.pp - 1) / w.vpp * (mean + sum(average.values()) + launch)
    # Gradients are summed once a step, so the last micro-batch is what can hide them.
    data = sum(_estimate_data_parallel_s(w, p, sent[group], one) for group in ("dp", "edp") if group in sent)
    update = _estimate_update_s(clock)
    parts = {"dense_s": m * stage.dense, "experts_s": m * stage.experts, "attention_s": m * stage.attention,
             "head_s": m * stage.head, "memory_s": m * stage.memory, "launch_s": m * launch,
             **{f"{group}_s": m * seconds for group, seconds in exposed.items()},
             "dp_s": data, "bubble_s": bubble, "optimizer_s": update}
    other = p.step_overhead_s + (0 if w.tuned else (p.untuned_slowdown - 1) * sum(parts.values()))
    # Model FLOPs without the gradients of weights (lora).
    share = {"train": 1.0, "lora": 2 / 3}[w.objective]
    return StepTime(**parts, other_s=other, tokens=w.step_tokens, num_gpus=w.num_gpus,
                    flops_per_token=share * w.shape.count_train_flops(w.seq_len),
                    peak_flops_per_s=w.chip.bf16_flops_per_s)


def estimate_router_s(w: Workload, parameters: Parameters | None = None) -> float:
    """Return the seconds of routers in a step, mean over stages: products and score kernels; included in
    `dense_s` and `memory_s`."""
    p, s = parameters or load_default_parameters(), w.shape
    clock, layers = Clock(w, p), s.num_moe_layers + (s.num_predictions if s.mtp_moe else 0)
    product = traffic.list_products(w, "beside experts")[:1]
    scores_s = clock.passed(traffic.count_score_bytes(w), "moe") * p.moe_passes * clock.moe_age
    return w.num_micro_batches * layers / w.pp * (clock.products(product) + scores_s)


def estimate_extra_layers(w: Workload, parameters: Parameters | None = None) -> float:
    """Return the cost of prediction layers and heads on the last stage, in units of a layer with messages:
    without recomputation and with experts inside an NVLink domain, as in fast layouts."""
    p = parameters or load_default_parameters()
    # A search compares layouts that differ in these: the answer must be the same for all of them.
    clock = Clock(replace(w, recompute="none", recompute_modules=(), ep=min(w.ep, w.links.domain)), p)
    sent = {message.group: message for message in traffic.list_messages(clock.w)}
    messages_s = sum(_estimate_exposed_s(clock.w, p, sent.get(group))
                     for group in OF_LAYERS) / w.num_micro_batches
    parts = _estimate_parts(clock, None)
    layer_s = (parts.trunk.total + messages_s * w.pp) / w.shape.num_layers
    return (parts.behind.total + parts.head.total) / layer_s


def _estimate_parts(clock: Clock, known: PartsCache | None) -> StepParts:
    """Return the seconds of a micro-batch, from the cache if possible."""
    if known is None:
        return StepParts(_estimate_trunk(clock), _estimate_prediction_layers(clock), _estimate_head(clock))
    # These do not change the seconds of a micro-batch before a pipeline cuts it, so a sweep reuses them.
    key = replace(clock.w, pp=1, vpp=1, stage_layers=(), num_gpus=1, global_batch_size=1)
    if key not in known:
        known[key] = _estimate_parts(clock, None)
    return known[key]


def _estimate_head(clock: Clock) -> _MicroBatch:
    """Return the seconds of all heads with their losses."""
    w = clock.w
    return _MicroBatch(head=(1 + w.shape.num_predictions) * (clock.products(traffic.list_products(w, "head"))
                                                             + traffic.count_head_bytes(w) / clock.hbm))


def _find_slowest_stage(w: Workload, parts: StepParts, messages_s: float) -> tuple[_MicroBatch, float, float]:
    """Return the seconds of a micro-batch on the slowest stage, the mean over stages, and the stage's layers
    divided by the mean."""
    s, (trunk, prediction, head) = w.shape, parts
    mean = (trunk.total + prediction.total + head.total) / w.pp
    stage = _MicroBatch()
    # Uneven stages: either the one with most layers is slowest, or the last one with the head.
    if w.pp > 1 and w.stage_layers:
        last = _MicroBatch()
        for part, share in ((trunk, w.stage_layers[-1] / s.num_layers), (prediction, 1), (head, 1)):
            last.add(part, share)
        stage.add(trunk, max(w.stage_layers) / s.num_layers)
        crowded = [layers * w.pp / s.num_layers for layers in (max(w.stage_layers), w.stage_layers[-1])]
        slowest = max(((stage, crowded[0]), (last, crowded[1])),
                      key=lambda found: found[0].total + found[1] * messages_s)
        return slowest[0], mean, slowest[1]
    total = _MicroBatch()
    total.add(trunk, 1)
    total.add(prediction, 1)
    layers, runs = s.num_layers + s.num_predictions, w.pp * w.vpp
    if layers % runs:  # the last stage has fewer layers, and the head
        stage.add(total, -(-layers // runs) * w.vpp / layers)
        if w.pp == 1 or stage.total < mean:
            stage = _MicroBatch()
            stage.add(total, 1 / w.pp)
            stage.add(head, 1 / w.pp)
    else:
        stage.add(total, 1 / w.pp)
        stage.add(head, 1)
    return stage, mean, 1.0


def _estimate_trunk(clock: Clock) -> _MicroBatch:
    s, trunk = clock.w.shape, _MicroBatch()
    blocks: list[tuple[Callable[[], _MicroBatch], int]] = [
        (lambda: _estimate_attention(clock, 0), s.num_attention_layers - s.num_window_layers),
        *((partial(_estimate_attention, clock, window), layers) for window, layers in s.windowed),
        (lambda: _estimate_block(clock, "mamba", traffic.count_mamba_bytes, "mamba"), s.num_mamba_layers),
        (lambda: _estimate_block(clock, "linear", traffic.count_linear_bytes, ""), s.num_linear_layers),
        (lambda: _estimate_block(clock, "dense", traffic.count_dense_bytes, "mlp"),
         s.num_feed_forward_layers - s.num_moe_layers),
        (lambda: _estimate_moe(clock), s.num_moe_layers)]
    for block, layers in blocks:
        if layers:
            trunk.add(block(), layers)
    return trunk


def _estimate_prediction_layers(clock: Clock) -> _MicroBatch:
    """Return the seconds of prediction layers without heads."""
    s, total = clock.w.shape, _MicroBatch()
    if s.num_predictions:
        ffn = _estimate_moe(clock) if s.mtp_moe else _estimate_block(
            clock, "dense", traffic.count_dense_bytes, "mlp")
        for part in (_estimate_attention(clock, s.mtp_window), ffn):
            total.add(part, s.num_predictions)
        total.dense += s.num_predictions * clock.products(traffic.list_products(clock.w, "prediction"))
    return total


def _estimate_block(clock: Clock, block: Block, passed_bytes: Callable[[
                    Workload], float], part: str) -> _MicroBatch:
    """Return the seconds of a block's products and memory-bound kernels; `part`: recomputation module."""
    products = traffic.list_products(clock.w, block)
    scan = (clock.scan(traffic.count_mamba_scan_flops(clock.w)) if block == "mamba"
            else clock.scan(traffic.count_linear_scan_flops(clock.w), "") if block == "linear" else 0.0)
    return _MicroBatch(dense=clock.products(products), attention=scan,
                       memory=clock.passed(passed_bytes(clock.w), part) + clock.around(products))


def _estimate_attention(clock: Clock, window: int) -> _MicroBatch:
    seconds = _estimate_block(clock, "attention", traffic.count_attention_bytes, "")
    seconds.attention = clock.attention(window)
    return seconds


def _estimate_moe(clock: Clock) -> _MicroBatch:
    dense, experts = traffic.list_products(
        clock.w, "beside experts"), traffic.list_products(clock.w, "expert")
    activation = "moe" if clock.again("moe") else "moe_act"
    memory = clock.passed(traffic.count_moe_bytes(clock.w), "moe") + clock.around(dense)
    if not clock.w.fused_experts:
        memory += (clock.passed(traffic.count_activation_bytes(clock.w), activation) + clock.around(experts))
    return _MicroBatch(dense=clock.products(dense), experts=clock.products(experts),
                       memory=memory * clock.p.moe_passes * clock.moe_age)


def _estimate_exposed_s(w: Workload, p: Parameters, message: traffic.TrafficMessage | None) -> float:
    """Return the exposed seconds of a step's messages."""
    if message is None:
        return 0.0
    # fitted runs show no gain; overlap is at least not slower
    beside_products = min(p.tp_exposed, p.tp_exposed_overlapped)
    share = {"tp": beside_products if w.overlap_tp else p.tp_exposed,
             "ep": p.ep_exposed_overlapped if w.overlap_ep else 1.0, "cp": p.cp_exposed,
             "pp": p.pp_exposed}[message.group]
    fraction = p.inside_fraction if message.link == "inside" else p.between_fraction
    if message.group == "ep":
        fraction *= p.ep_fraction[w.dispatcher]
    return share * (message.num_bytes / message.bytes_per_s / fraction + message.count * message.latency_s)


def _estimate_launch_s(clock: Clock) -> tuple[float, float]:
    """Return the host seconds for kernel launches of a micro-batch, and the GPU's wait for token counts
    in MoE layers."""
    w, p, s = clock.w, clock.p, clock.w.shape
    if w.cuda_graphs == "full":
        return 0.0, 0.0
    layers = s.num_attention_layers + s.num_linear_layers + s.num_mamba_layers + s.num_predictions
    moe = s.num_moe_layers + (s.num_predictions if s.mtp_moe else 0)
    share = {"none": 1.0, "partial": p.graph_launch_share}[w.cuda_graphs]
    # Fitted on forward and backward pass, so two passes count as one.
    share *= p.quantized_launch[w.precision] * clock.passes("", 1.0) / 2
    experts = moe * p.moe_launch_s * clock.moe_age * (1.0 if w.dropless else p.dropping_launch_share)
    seconds = (layers * p.layer_launch_s * clock.age + experts) / w.pp
    return seconds * share, moe / w.pp * p.moe_stall_s * clock.moe_age * share * w.dropless


def _estimate_data_parallel_s(w: Workload, p: Parameters, message: traffic.TrafficMessage, micro_batch_s:
                              float) -> float:
    """Return the exposed seconds of data-parallel messages."""
    fraction = p.inside_fraction if message.link == "inside" else p.between_fraction
    seconds = message.num_bytes / message.bytes_per_s / fraction + message.count * message.latency_s
    sharded = w.sharding == "fsdp"
    hidden = micro_batch_s * (w.num_micro_batches if traffic.gathers_each_micro_batch(w) else 1)
    # Without `overlap_param_gather`, only the backward pass (two thirds of a micro-batch) hides messages.
    hidden *= 1.0 if w.overlap_param_gather else 2 / 3
    hidden = hidden if w.overlap_grad_reduce or sharded else 0.0
    return max(0.0, seconds - hidden) + (p.fsdp_exposed if sharded else p.dp_exposed) * min(seconds, hidden)


def _estimate_update_s(clock: Clock) -> float:
    w = clock.w
    if w.objective != "train":
        return 0.0
    dense, experts = traffic.count_local_params(w)
    # Each process updates its share; experts have fewer copies to share with.
    if w.sharding != "none":
        dense, experts = dense / (w.dp * w.cp), experts / w.expert_dp
    num_params = dense + experts
    passed = num_params * UPDATE_BYTES[w.optimizer]
    seconds = passed * ((1 - w.offload) / clock.hbm + w.offload / clock.p.host_bytes_per_s)
    if w.optimizer == "muon":
        # The smaller dimension of a matrix is assumed to be the hidden size.
        seconds += num_params * NEWTON_SCHULZ * w.shape.hidden_size / clock.peak(False)
    return seconds
