"""Config items for attention windows, dense layers and prediction layers (see `hf_config.py`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_sov.base.errors import UserError
from megatron_sov.model.config import ModelConfig
from megatron_sov.model.config.bounds import MAX_LAYERS
from megatron_sov.model.config.model import shortest_pattern

PREDICTION_NAMES = ("num_nextn_predict_layers", "num_mtp_layers")
"""Config.json names for the number of prediction layers after the trunk; exports use the first."""
_LETTER = {"sliding_attention": "L", "full_attention": "G"}


def _parse_layer_letters(types: list[str], name: str, length: int) -> str:
    """Return attention types as letters L and G; `UserError` unless every layer has a known type."""
    letters = "".join(_LETTER.get(kind, "?") for kind in types)
    if len(letters) != length or "?" in letters:
        raise UserError(f"config.json: {name} must name sliding_attention or full_attention for each of "
                        f"{length} layers; it has {types}")
    return letters


def read_num_layers(config: dict[str, Any]) -> int:
    """Return `num_hidden_layers`; `UserError` for numbers whose per-layer lists would fill memory."""
    return _check_layer_count(int(config.get("num_hidden_layers", 0)), "num_hidden_layers")


def _check_layer_count(count: int, name: str) -> int:
    if count > MAX_LAYERS:
        raise UserError(f"config.json: {name} = {count} must be at most {MAX_LAYERS:,}; count its zeros")
    return count


def _find_main_window(config: dict[str, Any], default: int) -> tuple[int, bool]:
    """Return (window, whether windows differ) from the window lists, else from `sliding_window`.

    The prediction layer's window comes first, then the most frequent window of the trunk. `sliding_window`
    counts only if all windows are equal, because classes with a single window write a default there.
    """
    prediction_windows, trunk_windows = ([int(window) for window in config.get(name, []) if window]
                                         for name in ("mtp_sliding_windows", "sliding_windows"))
    differ = len({*prediction_windows, *trunk_windows}) > 1
    listed_window = next(iter(prediction_windows), max(trunk_windows, key=trunk_windows.count, default=0))
    if differ:
        return listed_window, True
    return config.get("sliding_window", listed_window or default), False


@dataclass(frozen=True)
class SlidingLayers:
    """Sliding layers from the explicit list `layer_types`; transformers derives a different list from the
    pattern alone."""

    default_window: int
    """Transformers' default for `sliding_window`, in tokens."""
    names: tuple[str, ...] = ("layer_types", "sliding_window", "sliding_window_pattern", "sliding_windows")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return `layer_types`, window, pattern, and `sliding_windows` (0: global) for vLLM. If windows
        differ, only `sliding_windows` has them, as in K-EXAONE 2.0."""
        single_window = {} if model.layer_windows else {"sliding_window": model.sliding_window_tokens}
        return {"layer_types": model.layer_types(), **single_window,
                "sliding_window_pattern": model.attention_pattern, "sliding_windows": model.windows()}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the shortest pattern and the windows; `UserError` for contradictions."""
        num_layers = read_num_layers(config)
        types = (config.get("layer_types")
                 or self.from_period(config.get("sliding_window_pattern", 4), num_layers))
        letters = _parse_layer_letters(types, "layer_types", num_layers)
        fields = {"attention_pattern": shortest_pattern(letters), "layer_windows": ()}
        layer_windows = [int(w or 0) for w in config.get("sliding_windows", [])]
        window, differ = _find_main_window(config, self.default_window)
        window = window if "L" in letters else 0
        if not layer_windows or layer_windows == [window if letter == "L" else 0 for letter in letters]:
            return fields | {"sliding_window_tokens": window}
        if not differ or [w > 0 for w in layer_windows] != [letter == "L" for letter in letters]:
            raise UserError(
                f"config.json: sliding_windows = {config['sliding_windows']} disagree with layer_types or "
                f"with sliding_window = {config.get('sliding_window')}, and programs read one or the other; "
                "give each sliding layer a window above 0, the others 0, and leave sliding_window out")
        return fields | {"sliding_window_tokens": window, "layer_windows": tuple(layer_windows)}

    @staticmethod
    def from_period(period: Any, num_layers: int) -> list[str]:
        """Return layer types for transformers' integer pattern: every `period`-th layer is global;
        `UserError` for other values, which need an explicit list."""
        if not isinstance(period, int) or period < 1:
            raise UserError(f"config.json: sliding_window_pattern = {period!r} needs an explicit layer_types "
                            "list beside it")
        return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(num_layers)]


@dataclass(frozen=True)
class SlidingSwitch:
    """Sliding windows with Qwen's switch `use_sliding_window`."""

    by_layer: bool
    """True: layers from `max_window_layers` on slide, or those in `layer_types`; False: all layers slide."""
    default_first: int = 28
    """Transformers' default for `max_window_layers`."""
    names: tuple[str, ...] = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the switch, the window and, with `by_layer`, the explicit list. Raises `UserError`: layers
        differ although `by_layer` is False."""
        types = model.layer_types()
        has_sliding_layers = "sliding_attention" in types
        fields = {"use_sliding_window": has_sliding_layers,
                  "sliding_window": model.sliding_window_tokens or None}
        if self.by_layer:
            first_sliding = types.index("sliding_attention") if has_sliding_layers else model.num_layers
            return {**fields, "max_window_layers": first_sliding, "layer_types": types}
        if len(set(types)) > 1:
            raise UserError(f"model.attention_pattern = {model.attention_pattern!r}: in family "
                            f"'{model.family}' either every layer slides or none does; use 'L' or 'G'")
        return fields

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return pattern and window; `UserError` if switch, window and list disagree."""
        num_layers = read_num_layers(config)
        slides = config.get("use_sliding_window", False)
        if slides and "sliding_window" not in config:
            raise UserError(f"config.json: use_sliding_window = {slides} needs sliding_window; "
                            "add it, or switch it off")
        first = config.get("max_window_layers", self.default_first) if self.by_layer else 0
        types = ["sliding_attention" if slides and i >= first else "full_attention"
                 for i in range(num_layers)]
        if self.by_layer:
            types = config.get("layer_types", types)
        letters = _parse_layer_letters(types, "layer_types", num_layers)
        if "L" in letters and not slides:
            raise UserError(f"config.json: layer_types = {types} names sliding layers, "
                            f"but use_sliding_window is {slides}; make them agree")
        window = config["sliding_window"] if "L" in letters else 0
        return {"attention_pattern": shortest_pattern(letters), "sliding_window_tokens": window}


@dataclass(frozen=True)
class RotatingWindows:
    """Layers in EXAONE 4: only sliding layers use RoPE, unless no layer slides (`sliding_window` is null)."""

    names: tuple[str, ...] = ("layer_types", "sliding_window", "sliding_window_pattern")
    null_tells: tuple[str, ...] = ("sliding_window",)
    """If absent, transformers assumes a window of 4096."""

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return list, window and pattern; `UserError` for a combination of RoPE and windows that the family
        does not have."""
        types = model.layer_types()
        has_sliding_layers = "sliding_attention" in types
        if model.rope_on_global == has_sliding_layers:
            raise UserError(f"model.rope_on_global = {model.rope_on_global}: in family '{model.family}' "
                            "global layers rotate exactly where no layer slides; set it to "
                            f"{str(not has_sliding_layers).lower()} for model.attention_pattern = "
                            f"{model.attention_pattern!r}")
        return {"layer_types": types, "sliding_window": model.sliding_window_tokens or None,
                "sliding_window_pattern": model.attention_pattern if has_sliding_layers else None}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return pattern, window, `rope_on_global`; `UserError`: only one of window and sliding layers."""
        num_layers, window = read_num_layers(config), config.get("sliding_window", 4096)
        types = config.get("layer_types") or (
            SlidingLayers.from_period(config.get("sliding_window_pattern", 4), num_layers) if window
            else ["full_attention"] * num_layers)
        letters = _parse_layer_letters(types, "layer_types", num_layers)
        if bool(window) != ("L" in letters):
            raise UserError(f"config.json: sliding_window = {window}, but layer_types names "
                            f"{'no' if window else 'a'} sliding layer; transformers rotates global layers "
                            "only where sliding_window is null, so make them agree")
        return {"attention_pattern": shortest_pattern(letters), "sliding_window_tokens": window or 0,
                "rope_on_global": not window}


def _count_dense_layers(config: dict[str, Any], is_dense: list[bool], name: str) -> dict[str, Any]:
    """Count dense layers; `UserError` unless all dense layers come first."""
    num_layers = read_num_layers(config)
    if len(is_dense) != num_layers or is_dense != sorted(is_dense, reverse=True):
        raise UserError(f"config.json: {name} must name dense layers first and layers with experts after, "
                        f"for num_hidden_layers = {num_layers} layers; a dense layer after a layer with "
                        "experts is not supported")
    return {"num_dense_layers": sum(is_dense)}


@dataclass(frozen=True)
class LeadingDenseLayers:
    """Dense layers before layers with experts, in all spellings of published configs."""

    default: int
    """Transformers' default."""
    names: tuple[str, ...] = ("first_k_dense_replace", "mlp_layer_types", "is_moe_layer",
                              "first_last_k_dense_replace")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"first_k_dense_replace": model.num_dense_layers, "mlp_layer_types": [
            "dense" if i < model.num_dense_layers else "sparse" for i in range(model.num_layers)]}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Count dense layers; `UserError` if two spellings disagree."""
        def mark_leading(count: Any) -> list[bool]:
            return [i < count for i in range(read_num_layers(config))]

        spellings: dict[str, Callable[[Any], list[bool]]] = {
            "mlp_layer_types": lambda kinds: [kind != "sparse" for kind in kinds],
            "is_moe_layer": lambda flags: [not flag for flag in flags], "first_k_dense_replace": mark_leading,
            "first_last_k_dense_replace": mark_leading}
        layers_by_spelling = {name: read(config[name]) for name, read in spellings.items() if name in config}
        if "mlp_layer_types" in layers_by_spelling and config.get("first_k_dense_replace") == self.default:
            # transformers' classes use the list, and write the default of an absent count.
            layers_by_spelling.pop("first_k_dense_replace")
        # Lists of layers come first in `spellings`: they are more precise than a count.
        is_dense = next(iter(layers_by_spelling.values()), mark_leading(self.default))
        if any(layers != is_dense for layers in layers_by_spelling.values()):
            raise UserError(
                f"config.json: {' and '.join(layers_by_spelling)} disagree about which layers are "
                "dense; make them agree")
        return _count_dense_layers(config, is_dense, next(iter(layers_by_spelling), "first_k_dense_replace"))


@dataclass(frozen=True)
class SparseSteps:
    """Dense layers in Qwen3-MoE's spelling: a list, and a step between layers with experts."""

    names: tuple[str, ...] = ("mlp_only_layers", "decoder_sparse_step")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"mlp_only_layers": list(range(model.num_dense_layers)), "decoder_sparse_step": 1}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Count leading dense layers."""
        dense_layers, step = config.get("mlp_only_layers", []), config.get("decoder_sparse_step", 1)
        is_dense = [i in dense_layers or (i + 1) % step != 0 for i in range(read_num_layers(config))]
        return _count_dense_layers(config, is_dense, "mlp_only_layers and decoder_sparse_step")


@dataclass(frozen=True)
class HfPredictionLayer:
    """Multi-token prediction layers: number, attention, depths and loss weight."""

    default_coeff: float = 0.05
    """Published loss weight, used if config.json has none."""
    writes_zero: bool = True
    """Whether exports without prediction layers write the number 0."""
    names: tuple[str, ...] = ("num_nextn_predict_layers", "mtp_layer_types", "mtp_sliding_windows",
                              "mtp_loss_scaling_factor", "mtp_share_layers", "mtp_num_speculative_steps")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return all fields; without prediction layers at most their number."""
        if not model.num_mtp_layers:
            return {"num_nextn_predict_layers": 0} if self.writes_zero else {}
        num_layers = model.num_mtp_layers
        depth_fields = {"mtp_num_speculative_steps": model.mtp_depths, "mtp_share_layers": True}
        return {"num_nextn_predict_layers": num_layers,
                "mtp_layer_types": [model.mtp_layer_type()] * num_layers,
                "mtp_sliding_windows": [model.mtp_window()] * num_layers,
                "mtp_loss_scaling_factor": model.mtp_loss_coeff,
                **(depth_fields if model.mtp_depths > 1 else {})}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return number, attention (global by default), depths and loss weight."""
        num_layers = _check_layer_count(config.get("num_nextn_predict_layers", 0), "num_nextn_predict_layers")
        letters = _parse_layer_letters(config.get("mtp_layer_types", ["full_attention"] * num_layers),
                           "mtp_layer_types", num_layers)
        window = _find_main_window(config, 0)[0] if "L" in letters else 0
        windows = config.get("mtp_sliding_windows", [window] * num_layers)
        if any((mtp_window or 0) != window for mtp_window in windows):
            raise UserError(f"config.json: mtp_sliding_windows = {windows}, but only {window} is supported: "
                            "the trunk's window for a sliding prediction layer, 0 for a global one")
        steps = config.get("mtp_num_speculative_steps", num_layers)
        if steps != num_layers and (num_layers != 1 or steps < 1):
            raise UserError(f"config.json: mtp_num_speculative_steps = {steps} with "
                            f"num_nextn_predict_layers = {num_layers}: a single prediction layer may be "
                            "applied repeatedly, several layers once each; make the two agree")
        return {"num_mtp_layers": num_layers, "mtp_attention": letters[:1] or "G",
                "mtp_depths": steps if num_layers == 1 else 1,
                "mtp_loss_coeff": config.get("mtp_loss_scaling_factor", self.default_coeff)}


@dataclass(frozen=True)
class PredictionAfterTrunk:
    """Number of prediction layers with experts after the last transformer layer."""

    names: tuple[str, ...] = (*PREDICTION_NAMES, "mtp_mlp_layer_types")

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the number of layers and `mtp_mlp_layer_types`, which transformers' reader needs;
        `UserError` for dense layers."""
        if model.num_mtp_layers and not model.mtp_experts:
            raise UserError(f"model.mtp_experts = False: the prediction layer of family '{model.family}' has "
                            "experts; set it to true, or model.num_mtp_layers to 0")
        kinds = {"mtp_mlp_layer_types": ["sparse"] * model.num_mtp_layers} if model.num_mtp_layers else {}
        return {PREDICTION_NAMES[0]: model.num_mtp_layers, **kinds}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the number of layers; `UserError` if names disagree or a layer is dense."""
        by_name = {name: config[name] for name in PREDICTION_NAMES if name in config}
        if set(config.get("mtp_mlp_layer_types", [])) - {"sparse"}:
            raise UserError(f"config.json: mtp_mlp_layer_types = {config['mtp_mlp_layer_types']}, but only "
                            "prediction layers with experts ('sparse') are supported for this family")
        if len(set(by_name.values())) > 1:
            values = " and ".join(f"{name} = {value}" for name, value in by_name.items())
            raise UserError(f"config.json: {values} disagree; remove one of them")
        count = next(iter(by_name.values()), 0)
        return {"num_mtp_layers": count, "mtp_experts": bool(count)}


@dataclass(frozen=True)
class SwigluLimits:
    """SwiGLU clamp per layer; 0: none."""

    names: tuple[str, ...] = ("swiglu_limits",)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the list; {} if no layer has a clamp."""
        if not any(model.swiglu_limits):
            return {}
        return {"swiglu_limits": [float(limit) for limit in model.swiglu_limits]}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the clamps; `UserError` unless every layer has a number of at least 0."""
        limits = [float(limit or 0) for limit in config.get("swiglu_limits", [])]
        if (limits and len(limits) != read_num_layers(config)) or any(limit < 0 for limit in limits):
            raise UserError(f"config.json: swiglu_limits = {limits} must have an entry of 0 or more for each "
                            f"of num_hidden_layers = {read_num_layers(config)} layers")
        return {"swiglu_limits": tuple(limits) if any(limits) else ()}


@dataclass(frozen=True)
class OutputNormSwitch:
    """A switch for norms on block outputs, in addition to norms on inputs."""

    hf: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.hf,)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the switch; `UserError` for other positions of norms."""
        if model.block_norms not in ("pre", "both"):
            raise UserError(f"model.block_norms = '{model.block_norms}': family '{model.family}' normalises "
                            "the input of blocks, or input and output; use 'pre' or 'both'")
        return {self.hf: model.block_norms == "both"}

    def read(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the positions of norms; `UserError` if the switch is absent."""
        if not isinstance(config.get(self.hf), bool):
            raise UserError(f"config.json: {self.hf} = {config.get(self.hf)} must be true or false, because "
                            "programs have different defaults; add it (true if the weights have a "
                            "post_norm1 in every layer)")
        return {"block_norms": "both" if config[self.hf] else "pre"}
