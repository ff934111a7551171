"""Estimate the seconds per optimizer step and component: a roofline with few fitted numbers
(docs/plan.md)."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Literal, NamedTuple

from megatron_sov.plan.speed import traffic
from megatron_sov.plan.speed.parameters import UNITS, Parameters, load_default_parameters
from megatron_sov.plan.speed.traffic import Product
from megatron_sov.plan.speed.workload import HEAD, Block, Workload

EXPERT_STREAMS = 4
"""CUDA streams for grouped products in Transformer Engine."""
SLOW_HOST = 2
"""Factor on the fitted host seconds: an H200's virtual machine took 1.9 times as long (docs/gpu.md)."""
HALF = 0.5
"""Recomputed share for modules `layer` and `op`: every second layer or product."""
UPDATE_BYTES = {"adam": 34, "muon": 26}
"""Optimizer -> memory traffic in bytes per updated weight: gradient for norm and update, master weight and
moments read and written, new weight."""
LAYER_GROUPS: tuple[Literal["tp", "ep", "cp"], ...] = ("tp", "ep", "cp")
"""Groups with messages in every layer: `TrafficMessage` bytes grow with the layers per stage."""
NEWTON_SCHULZ = 5 * 6
"""Muon's FLOPs per weight, in units equal to the matrix's smaller dimension: five iterations with three
products (arXiv 2502.16982)."""


class Clock:
    """Converts a workload's FLOPs and bytes to seconds on its chip (docs/plan.md)."""

    def __init__(self, w: Workload, p: Parameters) -> None:
        self.w, self.p = w, p
        self.family = w.chip.generation
        self.frozen = w.objective == "lora"
        # A chip sold with less power runs its tensor cores slower than its generation's reference chip.
        self.throttle = min(1.0, (w.chip.power_w / p.reference_power_w[self.family]) ** p.power_exponent)
        self.age = p.dense_ageing ** w.software_age_years
        self.moe_age = p.moe_ageing ** w.software_age_years
        self.hbm = (w.chip.hbm_bytes_per_s * p.hbm_fraction / self.age
                    / (1.0 if w.fused_kernels else p.unfused_passes))

    def get_peak(self, quantized: bool) -> float:
        """Return the FLOP/s for large products; `quantized`: in `Workload.precision`, otherwise bf16."""
        unit = UNITS[self.w.precision] if quantized else "bf16"
        if unit == "fp4" and self.w.shape.num_mamba_layers:
            unit = "fp8"  # hybrids keep most products in 8 bits or more (arXiv 2509.25149, section 3)
        return (self.w.chip.flops_per_s(unit) * self.p.product_fraction[self.family][unit] * self.throttle
                / self.age)

    def count_recomputations(self, part: str) -> float:
        """Return the mean number of recomputations; `part` is a name in `gpu.recompute_modules`."""
        w = self.w
        if w.recompute == "none" or part == HEAD:
            return 0.0
        if w.recompute == "full" or (part and part in w.recompute_modules):
            return 1.0
        return HALF if {"layer", "op"} & set(w.recompute_modules) else 0.0

    def count_passes(self, part: str, backward: float = 2.0) -> float:
        return 1 + backward + self.count_recomputations(part)

    def time_products(self, products: list[Product]) -> float:
        return sum(map(self.time_product, products))

    def time_product(self, product: Product) -> float:
        """Return a product's seconds in forward, backward and recomputation; frozen: no gradient."""
        w, p = self.w, self.p
        # Saturation: a product with depth `product_half_depth` reaches half the peak.
        peak = self.get_peak(product.quantized) * product.k / (product.k + p.product_half_depth)
        launches = 1.0
        if product.part == "moe":
            # Many small products are slower than a large product with the same FLOPs.
            rows = product.tokens / max(1e-9, product.groups)
            peak *= p.fused_expert_fraction if w.fused_experts else p.expert_fraction
            peak *= rows / (rows + p.expert_half_tokens)
            if not w.fused_experts:
                # a product per expert, and with quantization another kernel
                kernels = 1 if w.precision == "bf16" else 2
                launches = max(1.0, product.groups * kernels / EXPERT_STREAMS)
        operand_bytes = 1 if product.quantized and w.precision != "bf16" else 2
        # The product's output is always bf16.
        num_bytes = ((product.tokens * product.k + product.groups * product.n * product.k) * operand_bytes
                     + 2 * product.tokens * product.n)
        # Roofline: arithmetic or memory, whichever is slower, plus the time to fill the chip per launch.
        forward_s = max(product.flops / peak, num_bytes / self.hbm) + launches * p.product_fill_s
        # The backward pass computes the gradients of both operands; a frozen weight has none.
        return self.count_passes(product.part, 1.0 if self.frozen else 2.0) * forward_s

    def time_attention(self, window: int) -> float:
        """Return the attention seconds per layer over all passes; `window` in keys (0: none)."""
        w, p = self.w, self.p
        keys = min(window or w.seq_len, w.document_tokens or w.seq_len, w.seq_len)
        width = w.shape.query_dim
        peak = (w.chip.bf16_flops_per_s * p.attention_fraction[self.family] * self.throttle / self.age
                * width / (width + p.attention_half_width) * keys / (keys + p.attention_half_tokens))
        if w.attention_kernel == "portable":
            peak *= p.attention_portable[self.family]
        forward_s = traffic.count_attention_flops(w, window) / peak + p.product_fill_s
        return self.count_passes("core_attn", traffic.ATTENTION_BACKWARD) * forward_s

    def time_scan(self, flops: float, part: str = "mamba") -> float:
        return self.count_passes(part) * flops / (self.w.chip.bf16_flops_per_s * self.p.scan_fraction)

    def time_traffic(self, num_bytes: float, part: str) -> float:
        """Return the seconds over all passes for kernels with `num_bytes` traffic per forward pass."""
        return self.count_passes(part) * num_bytes / self.hbm

    def time_conversions(self, products: list[Product]) -> float:
        """Return the seconds to quantize operands (`train.fp8`) and to apply adapters (`lora.rank`)."""
        seconds = 0.0
        if self.w.precision != "bf16":
            passes = self.p.quantize_passes[self.w.precision]
            seconds += passes * traffic.count_quantized_bytes(products, self.frozen) / self.hbm
        if self.frozen:
            seconds += self.time_traffic(traffic.count_adapter_bytes(products), "")
        return seconds


@dataclass(frozen=True)
class StepTime:
    """Seconds per optimizer step on the slowest pipeline stage; `COMPONENTS` add up to `total_s`."""

    dense_s: float
    """Products in attention, Mamba, dense feed-forward networks and shared experts."""
    experts_s: float
    """Grouped products in routed experts."""
    attention_s: float
    """Attention products; scans in Mamba layers."""
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
    """`step_overhead_s`, and the slowdown by `untuned_slowdown`."""
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
    """Seconds per micro-batch and component."""

    dense: float = 0.0
    experts: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    memory: float = 0.0

    def add(self, other: "_MicroBatch", times: float) -> None:
        for name, seconds in vars(other).items():
            setattr(self, name, getattr(self, name) + times * seconds)

    @property
    def total(self) -> float:
        return sum(vars(self).values())


class StepParts(NamedTuple):
    """Seconds per micro-batch, summed over all pipeline stages."""

    trunk: _MicroBatch
    """Layers without prediction layers."""
    prediction: _MicroBatch
    """Prediction layers without heads."""
    head: _MicroBatch
    """Output heads after trunk and prediction layers, with losses."""


PartsCache = dict[Workload, StepParts]
"""Cache: `Workload` without pipeline and batch settings -> `StepParts`."""


def estimate_step(w: Workload, parameters: Parameters | None = None,
                  cache: PartsCache | None = None) -> StepTime:
    """Estimate the seconds per step. `parameters`: None: the package's; `cache`: for a layout search, valid
    for parameters that differ in launches only. Raises `UserError`: the chip has no products in the
    workload's precision."""
    p = parameters or load_default_parameters()
    clock, m = Clock(w, p), w.num_micro_batches
    # Messages between layers and stages are spread evenly over the micro-batches.
    sent = {message.group: message for message in traffic.list_messages(w)}
    average = {group: _estimate_exposed_s(w, p, sent.get(group)) / m for group in ("tp", "ep", "cp", "pp")}
    # The slowest stage sets the pipeline's pace, so its messages count instead of the mean.
    stage, mean, load = _find_slowest_stage(w, _estimate_parts(clock, cache),
                                            sum(average[group] for group in LAYER_GROUPS))
    exposed = {group: seconds * (load if group in LAYER_GROUPS else 1) for group, seconds in average.items()}
    if w.overlap_ep:
        # expert messages longer than a micro-batch's computation stay exposed
        total_s = _estimate_exposed_s(replace(w, overlap_ep=False), p, sent.get("ep")) / m * load
        exposed["ep"] = max(exposed["ep"], total_s - stage.total)
    device = stage.total + sum(exposed.values())
    host, stall = _estimate_launch_s(clock)
    # The host runs ahead: only stalls count, or launch time beyond the device's time.
    launch = max(stall, host - device)
    micro_batch_s = device + launch
    # 1F1B idles pp - 1 micro-batches, interleaving divides by vpp (arXiv 2104.04473, section 2.3).
    bubble = (w.pp - 1) / w.vpp * (mean + sum(average.values()) + launch)
    # Gradients are reduced once per step, so only the last micro-batch can hide the messages.
    data = sum(_estimate_data_parallel_s(w, p, sent[group], micro_batch_s)
               for group in ("dp", "edp") if group in sent)
    update = _estimate_update_s(clock)
    parts = {"dense_s": m * stage.dense, "experts_s": m * stage.experts, "attention_s": m * stage.attention,
             "head_s": m * stage.head, "memory_s": m * stage.memory, "launch_s": m * launch,
             **{f"{group}_s": m * seconds for group, seconds in exposed.items()},
             "dp_s": data, "bubble_s": bubble, "optimizer_s": update}
    other = p.step_overhead_s + (0 if w.tuned else (p.untuned_slowdown - 1) * sum(parts.values()))
    # LoRA: model FLOPs without weight gradients.
    share = {"train": 1.0, "lora": 2 / 3}[w.objective]
    return StepTime(**parts, other_s=other, tokens=w.step_tokens, num_gpus=w.num_gpus,
                    flops_per_token=share * w.shape.count_train_flops(w.seq_len),
                    peak_flops_per_s=w.chip.bf16_flops_per_s)


@cache
def load_slow_host() -> Parameters:
    """Load the package's parameters for a host that takes `SLOW_HOST` times as long for launches."""
    p = load_default_parameters()
    return replace(p, layer_launch_s=SLOW_HOST * p.layer_launch_s, moe_launch_s=SLOW_HOST * p.moe_launch_s,
                   moe_stall_s=SLOW_HOST * p.moe_stall_s)


def estimate_router_s(w: Workload, parameters: Parameters | None = None) -> float:
    """Return router seconds per step, mean over stages: products and score kernels, which `dense_s` and
    `memory_s` include."""
    p, s = parameters or load_default_parameters(), w.shape
    clock, layers = Clock(w, p), s.num_moe_layers + (s.num_predictions if s.mtp_moe else 0)
    product = traffic.list_products(w, "moe")[:1]
    scores_s = clock.time_traffic(traffic.count_score_bytes(w), "moe") * p.moe_passes * clock.moe_age
    return w.num_micro_batches * layers / w.pp * (clock.time_products(product) + scores_s)


def estimate_extra_layers(w: Workload, parameters: Parameters | None = None) -> float:
    """Return the cost of prediction layers and heads on the last stage, in units equal to a layer with
    messages: without recomputation and with experts inside an NVLink domain, as in fast layouts."""
    p = parameters or load_default_parameters()
    # A search varies recomputation and `parallel.ep`: all its layouts must get the same result.
    clock = Clock(replace(w, recompute="none", recompute_modules=(), ep=min(w.ep, w.links.domain)), p)
    sent = {message.group: message for message in traffic.list_messages(clock.w)}
    messages_s = sum(_estimate_exposed_s(clock.w, p, sent.get(group))
                     for group in LAYER_GROUPS) / w.num_micro_batches
    parts = _estimate_parts(clock, None)
    layer_s = (parts.trunk.total + messages_s * w.pp) / w.shape.num_layers
    return (parts.prediction.total + parts.head.total) / layer_s


def _estimate_parts(clock: Clock, cache: PartsCache | None) -> StepParts:
    """Return the seconds per micro-batch, from the cache if possible."""
    if cache is None:
        return StepParts(_estimate_trunk(clock), _estimate_prediction_layers(clock), _estimate_head(clock))
    # A sweep shares the entry: pipeline and batch sizes do not affect the sum over all stages.
    key = replace(clock.w, pp=1, vpp=1, stage_layers=(), num_gpus=1, global_batch_size=1)
    if key not in cache:
        cache[key] = _estimate_parts(clock, None)
    return cache[key]


def _estimate_head(clock: Clock) -> _MicroBatch:
    """Return the seconds for all heads with losses."""
    w = clock.w
    head_s = clock.time_products(traffic.list_products(w, "head")) + traffic.count_head_bytes(w) / clock.hbm
    return _MicroBatch(head=(1 + w.shape.num_predictions) * head_s)


def _find_slowest_stage(w: Workload, parts: StepParts, messages_s: float) -> tuple[_MicroBatch, float, float]:
    """Return the seconds per micro-batch on the slowest stage, the mean over stages, and the slowest stage's
    layers divided by the mean."""
    s, (trunk, prediction, head) = w.shape, parts
    mean = (trunk.total + prediction.total + head.total) / w.pp
    stage = _MicroBatch()
    # Uneven stages: the slowest has most layers, or is the last, with the head.
    if w.pp > 1 and w.stage_layers:
        last = _MicroBatch()
        for part, share in ((trunk, w.stage_layers[-1] / s.num_layers), (prediction, 1), (head, 1)):
            last.add(part, share)
        stage.add(trunk, max(w.stage_layers) / s.num_layers)
        loads = [layers * w.pp / s.num_layers for layers in (max(w.stage_layers), w.stage_layers[-1])]
        slowest, load = max(zip((stage, last), loads, strict=True),
                            key=lambda pair: pair[0].total + pair[1] * messages_s)
        return slowest, mean, load
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
    """Return the seconds for prediction layers without heads."""
    s, total = clock.w.shape, _MicroBatch()
    if s.num_predictions:
        if s.mtp_moe:
            ffn = _estimate_moe(clock)
        else:
            ffn = _estimate_block(clock, "dense", traffic.count_dense_bytes, "mlp")
        for part in (_estimate_attention(clock, s.mtp_window), ffn):
            total.add(part, s.num_predictions)
        total.dense += s.num_predictions * clock.time_products(traffic.list_products(clock.w, "prediction"))
    return total


def _estimate_block(clock: Clock, block: Block, count_bytes: Callable[[Workload], float], part: str
                    ) -> _MicroBatch:
    """Return the seconds for a block's products and memory-bound kernels; `part`: recomputation module."""
    products = traffic.list_products(clock.w, block)
    scan_s = 0.0
    if block == "mamba":
        scan_s = clock.time_scan(traffic.count_mamba_scan_flops(clock.w))
    elif block == "linear":
        scan_s = clock.time_scan(traffic.count_linear_scan_flops(clock.w), "")
    memory_s = clock.time_traffic(count_bytes(clock.w), part) + clock.time_conversions(products)
    return _MicroBatch(dense=clock.time_products(products), attention=scan_s, memory=memory_s)


def _estimate_attention(clock: Clock, window: int) -> _MicroBatch:
    seconds = _estimate_block(clock, "attention", traffic.count_attention_bytes, "")
    seconds.attention = clock.time_attention(window)
    return seconds


def _estimate_moe(clock: Clock) -> _MicroBatch:
    dense, experts = (traffic.list_products(clock.w, block) for block in ("moe", "expert"))
    activation = "moe" if clock.count_recomputations("moe") else "moe_act"
    memory = clock.time_traffic(traffic.count_moe_bytes(clock.w), "moe") + clock.time_conversions(dense)
    if not clock.w.fused_experts:
        memory += (clock.time_traffic(traffic.count_activation_bytes(clock.w), activation)
                   + clock.time_conversions(experts))
    return _MicroBatch(dense=clock.time_products(dense), experts=clock.time_products(experts),
                       memory=memory * clock.p.moe_passes * clock.moe_age)


def _estimate_exposed_s(w: Workload, p: Parameters, message: traffic.TrafficMessage | None) -> float:
    """Return the exposed seconds for a step's messages in one group."""
    if message is None:
        return 0.0
    # fitted runs show no gain; overlap is at least not slower
    overlapped = min(p.tp_exposed, p.tp_exposed_overlapped)
    share = {"tp": overlapped if w.overlap_tp else p.tp_exposed,
             "ep": p.ep_exposed_overlapped if w.overlap_ep else 1.0, "cp": p.cp_exposed,
             "pp": p.pp_exposed}[message.group]
    fraction = p.inside_fraction if message.link == "inside" else p.between_fraction
    if message.group == "ep":
        fraction *= p.ep_fraction[w.dispatcher]
    return share * (message.num_bytes / message.bytes_per_s / fraction + message.count * message.latency_s)


def _estimate_launch_s(clock: Clock) -> tuple[float, float]:
    """Return the host seconds for kernel launches per micro-batch, and the GPU's wait for token counts in
    MoE layers."""
    w, p, s = clock.w, clock.p, clock.w.shape
    if w.cuda_graphs == "full":
        return 0.0, 0.0
    layers = s.num_attention_layers + s.num_linear_layers + s.num_mamba_layers + s.num_predictions
    moe = s.num_moe_layers + (s.num_predictions if s.mtp_moe else 0)
    layer_s = p.layer_launch_s * clock.age
    # fitted on forward plus backward pass
    layer_s *= clock.count_passes("", 1.0) / 2
    expert_s = p.moe_launch_s * clock.moe_age * (1.0 if w.dropless else p.dropping_launch_share)
    expert_s *= clock.count_passes("moe", 1.0) / 2
    eager_s = layers * layer_s + moe * expert_s
    share = p.graph_launch_share if w.cuda_graphs == "partial" else 1.0
    if w.cuda_graphs == "routers":
        # Partial graphs save attention's launches too, at most those of a dense layer.
        saved_s = (1 - p.graph_launch_share) * expert_s - p.graph_launch_share * layer_s
        share -= s.num_moe_layers * max(0.0, saved_s) / eager_s
    share *= p.quantized_launch[w.precision]
    stall_s = p.moe_stall_s * clock.moe_age * clock.count_passes("moe", 1.0) / 2 * w.dropless
    return eager_s / w.pp * share, moe / w.pp * stall_s * share


def _estimate_data_parallel_s(w: Workload, p: Parameters, message: traffic.TrafficMessage,
                              micro_batch_s: float) -> float:
    """Return the exposed seconds for data-parallel messages (groups `dp` and `edp`)."""
    fraction = p.inside_fraction if message.link == "inside" else p.between_fraction
    seconds = message.num_bytes / message.bytes_per_s / fraction + message.count * message.latency_s
    sharded = w.sharding == "fsdp"
    hidden = micro_batch_s * (w.num_micro_batches if traffic.gathers_per_micro_batch(w) else 1)
    # Without `overlap_param_gather`, only the backward pass (two thirds of a micro-batch) hides messages.
    hidden *= 1.0 if w.overlap_param_gather else 2 / 3
    hidden = hidden if w.overlap_grad_reduce or sharded else 0.0
    return max(0.0, seconds - hidden) + (p.fsdp_exposed if sharded else p.dp_exposed) * min(seconds, hidden)


def _estimate_update_s(clock: Clock) -> float:
    w = clock.w
    if w.objective != "train":
        return 0.0
    dense, experts = traffic.count_local_params(w)
    # Each process updates its shard; experts have fewer replicas.
    if w.sharding != "none":
        dense, experts = dense / (w.dp * w.cp), experts / w.expert_dp
    num_params = dense + experts
    num_bytes = num_params * UPDATE_BYTES[w.optimizer]
    seconds = num_bytes * ((1 - w.offload) / clock.hbm + w.offload / clock.p.host_bytes_per_s)
    if w.optimizer == "muon":
        # Assumption: a matrix's smaller dimension is `hidden_size`.
        seconds += num_params * NEWTON_SCHULZ * w.shape.hidden_size / clock.get_peak(False)
    return seconds
