"""Infer a `ModelConfig` from Megatron-LM or Megatron-Bridge settings.

Setting names are those of Megatron-Core's `TransformerConfig` and of Bridge's providers.
`normalize_arguments` converts Megatron-LM's command line arguments, some of which differ.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_sov.base.documents.bounded_yaml import BoundedLoader
from megatron_sov.base.errors import UserError, format_problems
from megatron_sov.base.hints.table import load_package_table
from megatron_sov.base.settings import SettingsError
from megatron_sov.model.config import ModelConfig, from_dict
from megatron_sov.model.config.bounds import MAX_LAYERS
from megatron_sov.model.config.model import shortest_pattern
from megatron_sov.model.families import supported as models
from megatron_sov.model.families.family import COMMON_VALUES, EXPERT_GROUPS, TokenIds

Stated = Mapping[str, Any]
"""Setting under Megatron's name -> value; a setting that the source does not mention is missing."""
# architecture.yaml says what each table maps
_TABLES = load_package_table(Path(__file__).with_suffix(".yaml"))
RENAMED: dict[str, str] = _TABLES["renamed"]
MEGATRON_DEFAULTS: dict[str, Any] = _TABLES["megatron_defaults"]
EXPERT_NAMES: dict[str, str] = _TABLES["expert_names"]
YARN_NAMES: dict[str, str] = _TABLES["yarn_names"]
SUPPORTED_VALUES: dict[str, list[Any]] = _TABLES["supported_values"]
COUNTS: list[str] = _TABLES["counts"]
MAX_COUNT = 1 << 53


def check_counts(stated: Stated) -> None:
    """Raise `UserError` for counts that are not integers or far too large."""
    limits = {"num_layers": MAX_LAYERS, "mtp_num_layers": MAX_LAYERS} | dict.fromkeys(COUNTS, MAX_COUNT)
    if problems := [f"{name} = {str(value)[:80]!r}: must be a whole number from 0 to {most:,}"
                    for name, most in limits.items() if (value := stated.get(name)) is not None
                    and not (type(value) is int and 0 <= value <= most)]:
        raise UserError(f"Megatron settings: {'; '.join(problems)}; correct them in their source")


def normalize_arguments(args: Stated) -> dict[str, Any]:
    """Return Megatron-LM arguments (a Namespace's `vars`) under `TransformerConfig` names."""
    stated = dict(args)

    def move_key(old: str, new: str, convert: Callable[[Any], Any] = lambda value: value) -> None:
        if old in stated:
            stated[new] = convert(stated.pop(old))

    move_key("norm_epsilon", "layernorm_epsilon")
    move_key("apply_layernorm_1p", "layernorm_zero_centered_gamma")
    move_key("num_experts", "num_moe_experts")
    move_key("untie_embeddings_and_output_weights", "share_embeddings_and_output_weights", lambda on: not on)
    move_key("use_rope_scaling", "rope_scaling")
    move_key("disable_bias_linear", "add_bias_linear", lambda on: not on)
    move_key("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor")
    if "swiglu" in stated:
        is_swiglu = bool(stated.pop("swiglu"))
        # Without --swiglu Megatron-LM computes GELU.
        stated |= {"gated_linear_unit": is_swiglu, "activation_func": "silu" if is_swiglu else "gelu"}
    if stated.pop("use_rotary_position_embeddings", False):
        stated["position_embedding_type"] = "rope"
    if not stated.get("group_query_attention", True):
        stated["num_query_groups"] = None
    return stated


def infer_architecture(stated: Stated, family: str = "",
                       overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return the architecture in its only matching family.

    Args:
        stated: Megatron-Core or Bridge setting -> value.
        family: our family name; "": find the only match.
        overrides: `ModelConfig` fields that take precedence.

    Raises:
        UserError: missing settings, or no matching family; the message lists all problems.
    """
    check_counts(stated)
    fields, problems = infer_model_fields(stated)
    fields |= overrides or {}
    missing = [name for name in ("num_layers", "hidden_size", "num_heads", "vocab_size")
               if name not in fields]
    problems += [f"model.{name} is missing; pass --set model.{name}=N" for name in missing]
    if problems:
        raise UserError(format_problems("the model's settings", problems))
    # Families with experts are skipped for dense models, although their number of experts could be 0.
    names = [family] if family else [
        name for name, candidate in models.FAMILIES.items()
        if (fields["num_experts"] or candidate.structure.get("num_experts") == 0)
        # Families with a fixed uncommon value, such as output norms, need a setting that says so.
        and all(field in fields or candidate.structure.get(field, plain) == plain
                for field, plain in COMMON_VALUES.items())]
    matches = {name: model for name in names if (model := _build_model(name, fields)) is not None}
    # If several families can express the model, prefer families with the fewest optional features.
    num_varied = {name: len(models.get_family(name).varies) for name in matches}
    fewest = min(num_varied.values(), default=0)
    matches = {name: model for name, model in matches.items() if num_varied[name] == fewest}
    if len(matches) == 1:
        return next(iter(matches.values()))
    if matches:
        raise UserError(f"the model's settings: fit the families {', '.join(matches)}; choose one with "
                        "--family")
    reasons = {name: _find_mismatches(name, fields) for name in names}
    nearest = min(reasons, key=lambda name: len(reasons[name]))
    raise UserError(format_problems(f"the model's settings: fit no family; the nearest is '{nearest}'",
                                  reasons[nearest], "pass --family, and --set model.NAME=VALUE to correct a "
                                                    "setting"))


def describe_model(model: ModelConfig) -> dict[str, Any]:
    """Return a model's settings as Megatron-LM arguments; inverse of `normalize_arguments` and
    `infer_architecture`. Raises `UserError`: these arguments do not describe a field."""
    args = {megatron_name: getattr(model, field) for megatron_name, field in RENAMED.items()} | {
        "num_query_groups": model.num_kv_heads, "group_query_attention": True, "kv_channels": model.head_dim,
        "ffn_hidden_size": model.dense_ffn_dim or model.expert_ffn_dim, "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_tokens, "normalization": "RMSNorm", "swiglu": True,
        "add_bias_linear": False, "rotary_percent": 1.0, "mtp_num_layers": model.num_mtp_layers or None,
        "mtp_loss_scaling_factor": model.mtp_loss_coeff, "position_embedding_type": "rope",
        "rotary_seq_len_interpolation_factor": model.linear_rope_factor}
    args["norm_epsilon"] = args.pop("layernorm_epsilon")
    args["untie_embeddings_and_output_weights"] = not args.pop("share_embeddings_and_output_weights")
    if model.num_experts:
        args |= _describe_experts(model)
    if model.yarn is not None:
        args |= {"position_embedding_type": "yarn", "yarn_correction_range_round_to_int": True, **{
            f"yarn_{megatron_name}": getattr(model.yarn, field) for field,
            megatron_name in YARN_NAMES.items()}}
    if model.llama3_rope is not None:
        args |= {"use_rope_scaling": True, "rope_scaling_factor": model.llama3_rope.factor}
    if model.sliding_window_tokens:
        is_sliding = [int(kind == "sliding_attention") for kind in model.layer_types()]
        args |= {"window_size": (model.sliding_window_tokens - 1, 0), "window_attn_skip_freq": is_sliding}
        if not model.rope_on_global:
            args["no_rope_freq"] = [1 - layer_slides for layer_slides in is_sliding]
    _check_inverse(model, args)
    return args


def describe_provider(model: ModelConfig) -> dict[str, Any]:
    """Return the `model` section of Megatron-Bridge's run_config.yaml; for errors see `describe_model`."""
    stated = normalize_arguments(describe_model(model))
    stated["seq_length"] = stated.pop("max_position_embeddings")
    del stated["group_query_attention"]
    # transformers' classes with this score have expert groups
    if model.num_experts and model.router_score == "sigmoid":
        stated |= {"moe_router_num_groups": model.num_expert_groups,
                   "moe_router_group_topk": model.num_groups_per_token}
    return stated | _TABLES["provider"] | (_TABLES["provider_of_experts"] if model.num_experts else {})


def _check_inverse(model: ModelConfig, args: Stated) -> None:
    """Raise `UserError` if Megatron-LM arguments do not say everything about a model."""
    missing_fields = [name for name, plain in COMMON_VALUES.items()
                      if getattr(model, name) != plain and name not in (*EXPERT_GROUPS, "mtp_experts")]
    if model.num_experts and model.num_mtp_layers and not model.mtp_experts:
        missing_fields.append("dense prediction layers (num_mtp_layers)")
    if not missing_fields:
        # without dense layers their width is not read
        idle = {} if model.num_dense_layers or not model.num_experts else {
            "dense_ffn_dim": model.dense_ffn_dim}
        family = models.get_family(model.family)
        inferred = infer_architecture(normalize_arguments(args), model.family, idle)
        config, inferred_config = (family.to_hf_config(candidate, "any", TokenIds())
                                   for candidate in (model, inferred))
        missing_fields = [name for name in config if config[name] != inferred_config.get(name)]
    if missing_fields:
        raise UserError(f"a model of family {model.family} cannot be written for Megatron-Core's GPTModel: "
                        f"it has {', '.join(missing_fields)}, which `convert to-megatron` does not describe; "
                        "use `megatron-sov convert to-hf`")


def _describe_experts(model: ModelConfig) -> dict[str, Any]:
    args = {megatron_name: getattr(model, field) for megatron_name, field in EXPERT_NAMES.items()}
    args["num_experts"] = args.pop("num_moe_experts")
    if model.num_expert_groups > 1:
        args |= {"moe_router_num_groups": model.num_expert_groups,
                 "moe_router_group_topk": model.num_groups_per_token}
    return args | {
        "moe_ffn_hidden_size": model.expert_ffn_dim,
        "moe_shared_expert_intermediate_size": model.expert_ffn_dim * model.num_shared_experts or None,
        "moe_layer_freq": [0] * model.num_dense_layers + [1] * model.num_moe_layers(),
        "moe_router_topk_scaling_factor": model.routed_scaling_factor,
        "moe_router_pre_softmax": not model.norm_topk_prob,
        "moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": model.seq_aux_loss_coeff}


def infer_model_fields(stated: Stated) -> tuple[dict[str, Any], list[str]]:
    """Return `ModelConfig` fields, and a sentence for each unsupported setting."""
    problems = [f"{name} = {stated[name]!r}: only {' or '.join(map(repr, allowed))} is read"
                for name, allowed in SUPPORTED_VALUES.items() if name in stated
                and not _is_supported(stated[name], allowed)]
    known = MEGATRON_DEFAULTS | {name: value for name, value in stated.items() if value is not None}
    fields = {field: known[name] for name, field in RENAMED.items() if name in known}
    inferences = (_infer_attention, _infer_feed_forward, _infer_positions, _infer_pattern, _infer_prediction)
    for infer in inferences:
        try:
            fields |= infer(stated)
        except (TypeError, ValueError, KeyError, IndexError, ArithmeticError) as e:
            problems.append(str(e) if type(e) is ValueError  # raised by `infer`, with a sentence
                            else f"a value cannot be read ({type(e).__name__}: {e})")
    for name in ("vocab_size", "padded_vocab_size"):
        if stated.get(name) is not None:
            fields["vocab_size"] = stated[name]
            break
    return fields, problems


def _is_supported(value: Any, allowed: Sequence[Any]) -> bool:
    if isinstance(value, Mapping):  # Bridge's way to name a function: {_target_: torch.nn.functional.silu}
        value = str(value.get("_target_", value.get("class", ""))).rpartition(".")[2]
    return any(value == allowed_value and isinstance(value, bool) == isinstance(allowed_value, bool)
               for allowed_value in allowed)


def _infer_attention(stated: Stated) -> dict[str, Any]:
    heads = stated.get("num_attention_heads")
    if not heads:
        return {}
    fields = {"num_kv_heads": stated.get("num_query_groups") or heads}
    if stated.get("kv_channels"):
        fields["head_dim"] = stated["kv_channels"]
    elif stated.get("hidden_size"):
        fields["head_dim"] = stated["hidden_size"] // heads
    return fields


def _infer_feed_forward(stated: Stated) -> dict[str, Any]:
    """Return feed-forward widths, experts and routing."""
    ffn_dim, experts = stated.get("ffn_hidden_size"), stated.get("num_moe_experts")
    if not experts:
        return {"num_experts": 0, "num_shared_experts": 0, "num_dense_layers": 0,
                **({"dense_ffn_dim": ffn_dim} if ffn_dim else {})}
    expert_dim = stated.get("moe_ffn_hidden_size") or ffn_dim or 1
    shared_dim = stated.get("moe_shared_expert_intermediate_size") or 0
    if shared_dim % expert_dim:
        raise ValueError(
            f"moe_shared_expert_intermediate_size = {shared_dim} must be a multiple of the experts' "
            f"width {expert_dim}")
    num_dense = _count_dense_layers(stated.get("moe_layer_freq", 1), stated["num_layers"])
    score = stated.get("moe_router_score_function", "softmax")
    fields: dict[str, Any] = {"num_experts_per_token": 2}  # Megatron's default
    fields |= {field: stated[megatron_name] for megatron_name, field in EXPERT_NAMES.items()
               if stated.get(megatron_name) is not None}
    fields |= {"expert_ffn_dim": expert_dim, "num_shared_experts": shared_dim // expert_dim,
               "num_dense_layers": num_dense, "router_score": score,
               "router_bias": bool(stated.get("moe_router_enable_expert_bias", False)),
               "routed_scaling_factor": stated.get("moe_router_topk_scaling_factor") or 1.0,
               # Softmax over chosen experts equals softmax over all experts divided by the chosen sum.
               "norm_topk_prob": score == "sigmoid" or not stated.get("moe_router_pre_softmax", False),
               # Megatron builds the prediction layer like the last transformer layer.
               "dense_ffn_dim": ffn_dim if num_dense else 0,
               "mtp_experts": bool(stated.get("mtp_num_layers")),
               **_infer_groups(stated)}
    if stated.get("moe_router_load_balancing_type") == "seq_aux_loss":
        fields["seq_aux_loss_coeff"] = stated.get("moe_aux_loss_coeff", 0.0)
    return fields


def _infer_groups(stated: Stated) -> dict[str, Any]:
    """Return expert groups, if Megatron scores groups as we do."""
    groups, top_groups = stated.get("moe_router_num_groups") or 1, stated.get("moe_router_group_topk")
    if groups == 1 or not top_groups:
        return {}
    if (top_experts := stated.get("moe_router_topk", 2)) // top_groups != 2:
        raise ValueError(f"moe_router_group_topk = {top_groups} with moe_router_topk = {top_experts}: "
                         "Megatron scores a group by its best topk / group_topk experts, and only the best "
                         "two are supported")
    return {"num_expert_groups": groups, "num_groups_per_token": top_groups}


def _count_dense_layers(frequency: Any, num_layers: int) -> int:
    if isinstance(frequency, str):
        frequency = _parse_list(frequency)
    if isinstance(frequency, int):
        pattern = [int(layer % frequency == 0) for layer in range(num_layers)]
    else:
        pattern = list(frequency)
    num_dense = pattern.index(1) if 1 in pattern else len(pattern)
    if len(pattern) != num_layers or pattern[num_dense:] != [1] * (num_layers - num_dense):
        raise ValueError(f"moe_layer_freq = {frequency!r}: all dense layers must come before layers with "
                         "experts")
    return num_dense


def _parse_list(text: str) -> list[int]:
    """Return the numbers in Megatron-LM's list syntax, with products and sums of lists such as
    `[0]*3+[1]*58`."""
    values: list[int] = []
    for term in text.replace(" ", "").strip("()").split("+"):
        # Checkpoints are untrusted input, so the text is parsed, not evaluated.
        inner, _, times = term.strip("()").partition("]")
        if not inner.startswith("[") or not re.fullmatch(r"(\*\d{1,5})?", times):
            raise ValueError(f"{text[:80]!r} is not a list of numbers such as [0]*3+[1]*58")
        numbers = [int(n) for n in inner[1:].split(",") if n]
        if len(values) + len(numbers) * int(times[1:] or 1) > MAX_LAYERS:
            raise ValueError(f"{text[:80]!r} has more than {MAX_LAYERS:,} layers")
        values += numbers * int(times[1:] or 1)
    return values


def _infer_positions(stated: Stated) -> dict[str, Any]:
    length = max((stated[name] for name in ("max_position_embeddings", "seq_length") if stated.get(name)),
                 default=None)
    fields: dict[str, Any] = {"max_position_tokens": length} if length else {}
    if stated.get("position_embedding_type") == "yarn":
        if any(stated.get(f"yarn_{name}") not in (None, 1.0, 0.0) for name in ("mscale", "mscale_all_dim")):
            raise ValueError("yarn_mscale, yarn_mscale_all_dim: other values than 1 are not read")
        fields["yarn"] = {field: stated[f"yarn_{megatron_name}"] for field,
                          megatron_name in YARN_NAMES.items()
                          if stated.get(f"yarn_{megatron_name}") is not None}
    if stated.get("rope_scaling"):
        # Other parameters are constants in Megatron-Core's RotaryEmbedding.
        fields["llama3_rope"] = {"factor": stated.get("rope_scaling_factor") or 8.0}
    if stated.get("seq_len_interpolation_factor") not in (None, 1.0):
        fields["linear_rope_factor"] = float(stated["seq_len_interpolation_factor"])
    return fields


def _infer_pattern(stated: Stated) -> dict[str, Any]:
    """Return which layers have sliding windows, and which use RoPE."""
    window, num_layers = stated.get("window_size"), stated.get("num_layers") or 0
    frequency, no_rope = stated.get("window_attn_skip_freq"), stated.get("no_rope_freq")
    if window is None:
        if no_rope:
            raise ValueError(f"no_rope_freq = {no_rope!r}: layers without RoPE are only supported in models "
                             "with sliding layers")
        return {}
    if not isinstance(window, (list, tuple)):
        window = _parse_list(f"[{str(window).strip('()[]')}]")
    num_left = window[0]
    flags, is_number = _expand_frequency([True] * num_layers if frequency is None else frequency, num_layers)
    # a number flags every n-th layer, which is global; a list flags the sliding layers
    is_sliding = [not flag for flag in flags] if is_number else flags
    letters = "".join("L" if layer_slides else "G" for layer_slides in is_sliding)
    fields = {"attention_pattern": shortest_pattern(letters), "sliding_window_tokens": num_left + 1}
    if no_rope:
        if [not flag for flag in _expand_frequency(no_rope, num_layers)[0]] != is_sliding:
            raise ValueError("no_rope_freq and window_attn_skip_freq: only layers without a window may be "
                             "without RoPE")
        fields["rope_on_global"] = False
    return fields


def _expand_frequency(frequency: Any, num_layers: int) -> tuple[list[bool], bool]:
    """Return a flag per layer, and whether `frequency` is a number n, which flags every n-th layer."""
    if isinstance(frequency, str):
        frequency = int(frequency) if frequency.isdecimal() else _parse_list(frequency)
    if isinstance(frequency, int):
        if frequency < 1:
            raise ValueError(f"a frequency of layers is {frequency}, and must be at least 1")
        return [(layer + 1) % frequency == 0 for layer in range(num_layers)], True
    return [bool(flag) for flag in frequency], False


def _infer_prediction(stated: Stated) -> dict[str, Any]:
    count = stated.get("mtp_num_layers") or 0
    if not count:
        return {"num_mtp_layers": 0}
    coefficient = stated.get("mtp_loss_scaling_factor")
    return {"num_mtp_layers": count, **({"mtp_loss_coeff": coefficient} if coefficient is not None else {})}


def _complete_fields(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return all fields of a family's model; the family's fixed values are defaults."""
    family = models.get_family(name)
    return {**family.training, **family.structure, **fields, "family": name}


def _build_model(name: str, fields: Mapping[str, Any]) -> ModelConfig | None:
    if _find_mismatches(name, fields):
        return None
    return from_dict({"recipe": "from-megatron", "model": _complete_fields(name, fields)}).model


def _find_mismatches(name: str, fields: Mapping[str, Any]) -> list[str]:
    """Return the reasons for which a model does not belong to a family."""
    try:
        model = from_dict({"recipe": "from-megatron", "model": _complete_fields(name, fields)}).model
    except SettingsError as e:
        return [problem.sentence for problem in e.problems]
    return [problem.sentence for problem in model.problems() + models.get_family(name).problems(model)]


MAX_BYTES = 8 << 20
"""Limit for a Bridge YAML file; a run's whole configuration has about 100 kB."""


def read_sections(file: Path) -> dict[str, dict[str, Any]]:
    """Return the sections (model, train, optimizer, ...) of a Megatron-Bridge YAML file (`ConfigContainer`);
    `_target_` stays text. Raises `UserError`: the file is not YAML with plain values, or has no sections."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{file}: has {file.stat().st_size:,} bytes; a settings file has at most "
                            f"{MAX_BYTES:,}; pass a YAML file of Megatron-Bridge")
        document = yaml.load(file.read_text(encoding="utf-8-sig"), Loader=BoundedLoader)
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); see to its permissions") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{file}: is not YAML with plain values ({reason}); restore it from its "
                        "source") from None
    sections = {}
    if isinstance(document, dict):
        sections = {name: value for name, value in document.items() if isinstance(name, str)}
    if not any(isinstance(value, dict) for value in sections.values()):
        raise UserError(f"{file}: has no sections such as model and train, so it is not a configuration of "
                        "Megatron-Bridge")
    return {name: {str(key): item for key, item in value.items()} for name, value in sections.items()
            if isinstance(value, dict)}
