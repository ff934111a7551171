"""Model families: declarations that map weights and config of a model to a Hugging Face folder."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_sov.base.errors import UserError, suggest_spelling
from megatron_sov.base.settings import (
    ProblemCode, SettingsError, SettingsProblem, find_broken_rules, find_declaration_problems)
from megatron_sov.base.settings.problem import format_setting
from megatron_sov.model.config import ModelConfig, from_dict
from megatron_sov.model.families.encoders import encoder_links
from megatron_sov.model.families.hf_config import ConfigItem, Encoders, Fixed, Renamed, Unused
from megatron_sov.model.families.hf_layers import PREDICTION_NAMES
from megatron_sov.model.families.weights import Link, WeightSection, build_links

OUTER_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings")
"""Fields of a multimodal folder's config.json that apply to its text model."""
ANY_VALUE = object()
HARMLESS_FIELDS: dict[str, Any] = {
    # Execution options, file names, classifier heads and weight initialisation.
    **dict.fromkeys((
        "_attn_implementation", "_attn_implementation_internal", "attn_implementation",
        "_experts_implementation", "_experts_implementation_internal", "experts_implementation",
        "gradient_checkpointing", "_commit_hash", "name_or_path", "id2label", "label2id", "num_labels",
        "problem_type", "classifier_dropout", "hidden_dropout", "token_classification_bias", "sep_token_id",
        "init_std", "initializer_factor", "return_dict"), ANY_VALUE),
    "chunk_size_feed_forward": 0, "is_causal": True, "is_encoder_decoder": False, "num_mtp_layers": 0,
    "output_attentions": False, "output_hidden_states": False, "partial_rotary_factor": 1.0}
"""Fields that transformers reads for all families -> the value (or `ANY_VALUE`) without effect on logits."""
FOREIGN_PREFIXES = ("_", "transformers.js_", "unsloth_")
"""Prefixes for fields that other programs write for their own use."""
MAX_POSITIONS = Renamed("max_position_embeddings", "max_position_tokens")
FOLDER_FIELDS = Unused((
    "model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "output_router_logits", "bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class",
    "_name_or_path", "auto_map"))
"""Fields specific to a folder, or written again by every export."""
COMMON_CONFIG: tuple[ConfigItem, ...] = (
    Renamed("vocab_size", "vocab_size"), Renamed("hidden_size", "hidden_size"),
    Renamed("num_hidden_layers", "num_layers"), Renamed("num_attention_heads", "num_heads"),
    MAX_POSITIONS, Renamed("initializer_range", "init_std", 0.02), Fixed("attention_dropout", 0.0),
    Encoders(), FOLDER_FIELDS)
"""Config items for all families."""
DECODER_CONFIG: tuple[ConfigItem, ...] = (*COMMON_CONFIG, Fixed("hidden_act", "silu"))
"""Config items for most families."""
KV_HEADS = Renamed("num_key_value_heads", "num_kv_heads")
"""A required field, because transformers has a different default in each family."""
EXPERTS_CONFIG: tuple[ConfigItem, ...] = (
    Renamed("num_experts_per_tok", "num_experts_per_token", 8),
    Renamed("moe_intermediate_size", "expert_ffn_dim"), Fixed("attention_bias", False, written=False))
"""Config items for families with experts."""
DEEPSEEK_ROUTER_CONFIG: tuple[ConfigItem, ...] = (
    Fixed("norm_topk_prob", True),
    Renamed("n_group", "num_expert_groups", 1), Renamed("topk_group", "num_groups_per_token", 1),
    Fixed("scoring_func", "sigmoid", written=False), Fixed("topk_method", "noaux_tc", written=False))
DEEPSEEK_ROUTER = {"router_score": "sigmoid", "router_bias": True, "norm_topk_prob": True}
"""`ModelConfig` fields fixed by DeepSeek-V3's routing; `DEEPSEEK_ROUTER_CONFIG` has its config items."""
EXPERT_GROUPS = ("num_expert_groups", "num_groups_per_token")
"""Fields of group-limited routing, for `Family.varies`."""
TRAINING_FIELDS = ("router_bias_update", "router_bias_update_rate", "seq_aux_loss_coeff", "mtp_loss_coeff",
                   "init_std")
"""Fields of `ModelConfig` that only affect training."""
EXPERT_FIELDS = ("num_experts_per_token", "num_expert_groups", "num_groups_per_token", "num_shared_experts",
                 "expert_ffn_dim", "router_score", "norm_topk_prob", "router_bias", "routed_scaling_factor")
PREDICTION_FIELDS = ("mtp_experts", "mtp_attention", "mtp_depths")
"""Fields without effect in models without prediction layers; `EXPERT_FIELDS` in models without experts."""
COMMON_VALUES: dict[str, Any] = {
    "block_norms": "pre", "embedding_multiplier": 1.0, "attention_multiplier": None,
    "residual_multiplier": 1.0, "logits_multiplier": 1.0, "rope_share": 1.0,
    "logits_softcap": None, "local_rope_theta": None, "zero_centered_norms": False, "activation": "silu",
    "layer_windows": (), "swiglu_limits": (), "mtp_depths": 1, "num_expert_groups": 1,
    "num_groups_per_token": 1, "mtp_experts": False, "latent_attention": None, "linear_attention": None,
    "attention_output_gate": False}
"""Rarely varied fields of `ModelConfig` -> the value for families that do not list the field in `varies`."""


@dataclass(frozen=True)
class NestedTextModel:
    """A text model inside a multimodal Hugging Face folder, which is read as the text model alone."""

    hf_class: str
    """Transformers class for the folder."""
    family: str
    """Text model family."""
    renamed: tuple[tuple[str, str], ...]
    """(prefix of a text tensor in the folder, prefix in the family)."""
    others: tuple[str, ...]
    """Prefixes for all other tensors."""
    defaults: dict[str, Any]
    """Transformers' defaults for fields of `text_config` that the family requires."""

    def extract_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the text model's config.json. Raises `UserError`: `text_config` is missing, belongs to
        another family, or contradicts the outer config."""
        nested = config.get("text_config")
        if not isinstance(nested, dict):
            raise UserError(f"config.json: text_config = {nested!r} must hold the text model's settings in a "
                            f"folder of {self.hf_class}; restore it from its source")
        if nested.get("model_type", self.family) != self.family:
            raise UserError(f"config.json: text_config.model_type = {nested['model_type']!r}, but only "
                            f"{self.family!r} is supported in a folder of {self.hf_class}")
        if config.get("architectures", [self.hf_class]) != [self.hf_class]:
            raise UserError(f"config.json: architectures = {config['architectures']}, but model_type "
                            f"{config['model_type']!r} is {self.hf_class}; make them agree")
        tied = [part["tie_word_embeddings"] for part in (config, nested)
                if part.get("tie_word_embeddings") is not None]
        if len(tied) > 1 and tied[0] != tied[1]:
            raise UserError(f"config.json: tie_word_embeddings = {tied[0]}, and {tied[1]} in text_config; "
                            "make them agree")
        # The outer config's token ids take precedence over the nested ones; its class does not.
        outer = {name: config[name] for name in OUTER_FIELDS if config.get(name) is not None}
        inner = {name: value for name, value in nested.items() if name != "architectures"}
        return {**self.defaults, **inner, **outer, "model_type": self.family}

    def map_tensor_names(self, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """Return family name -> folder name for text and unknown tensors, and the folder names of excluded
        tensors. Raises `UserError`: two tensors map to the same name."""
        folder_names: dict[str, str] = {}
        excluded = []
        for name in names:
            if name.startswith(self.others):
                excluded.append(name)
                continue
            family_name = next((new + name.removeprefix(old) for old, new in self.renamed
                                if name.startswith(old)), name)
            if family_name in folder_names:
                raise UserError(f"{folder_names[family_name]} and {name} are both {family_name} of the text "
                                "model; remove one of them")
            folder_names[family_name] = name
        return folder_names, excluded


NESTED_TEXT_MODELS = {
    "gemma3": NestedTextModel(
        "Gemma3ForConditionalGeneration", "gemma3_text",
        # Names in released folders, then names in transformers 5's model.
        (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."),
         ("model.language_model.", "model.")),
        ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
        {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
         "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072}),
}
"""model_type of a folder -> its text model."""
KIMI_K2 = "kimi_k2"
"""model_type of folders with DeepSeek-V3's class and weights."""


def extract_text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the text model: the nested config for multimodal folders, else `config`."""
    if config.get("model_type") == KIMI_K2:
        return config | {"model_type": "deepseek_v3"}
    inside = NESTED_TEXT_MODELS.get(str(config.get("model_type")))
    return config if inside is None else inside.extract_config(config)


@cache
def load_transformers_fields() -> dict[str, frozenset[str]]:
    """Return family -> config.json fields declared or read by transformers' source for it; "shared": fields
    read for all families (`tests/freeze_fields.py` writes the table)."""
    table = Path(__file__).with_name("transformers_fields.json")
    return {name: frozenset(names) for name, names in json.loads(table.read_text(encoding="utf-8")).items()}


@dataclass(frozen=True)
class TokenIds:
    """Special token ids of a Hugging Face config; None if unknown."""

    bos: int | None = None
    eos: int | list[int] | None = None
    pad: int | None = None


@dataclass(frozen=True)
class Family:
    """Model family declaration."""

    name: str
    """`model_type` in transformers."""
    hf_classes: tuple[str, ...]
    """Accepted transformers class names; exports use the first."""
    weights: tuple[WeightSection, ...]
    """Weight map."""
    config: tuple[ConfigItem, ...]
    """Config map."""
    structure: dict[str, Any]
    """`ModelConfig` fields with a fixed value in this family."""
    varies: tuple[str, ...] = ()
    """Fields of `COMMON_VALUES` that the config map reads and writes."""
    training: dict[str, Any] = field(default_factory=dict)
    """Training-only fields that config.json does not store -> published value."""
    needs_shared_expert: bool = False
    """Whether the model always has a shared expert in transformers."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Copied tensor in a prediction layer ("{l}" is the layer index) -> original tensor. Exports write
    copies; imports do not need them."""
    respelt: tuple[tuple[str, str], ...] = ()
    """Alternative spellings in tensor names of folders: (spelling in folders, our spelling)."""
    in_memory: tuple[tuple[str, str], ...] = ()
    """(part of a module name in folders, replacement in transformers' model)."""
    reader_split: str | None = None
    """Regular expression by which transformers' tokenizer class splits text, regardless of tokenizer.json.
    None: the class follows the file."""

    def links(self, model: ModelConfig) -> list[Link]:
        """Return links from all tensors in `model` to Hugging Face tensors."""
        return build_links(self.weights, model) + encoder_links(model)

    def find_copies(self, model: ModelConfig) -> dict[str, str]:
        """Return copied tensor -> original tensor for folders of `model`."""
        if not model.num_mtp_layers:
            return {}
        return {name.replace("{l}", str(model.num_layers)): other for name, other in self.copies.items()}

    def has_mtp_after_trunk(self) -> bool:
        """Return whether Hugging Face counts the prediction layer as an additional transformer layer."""
        return any(section.where == "mtp layer behind" for section in self.weights)

    def problems(self, model: ModelConfig) -> list[SettingsProblem]:
        """Return properties of `model` that the family cannot express; values must be within bounds."""
        # A field that the config map cannot write must have its common value, or exports would lose it.
        fixed = {name: value for name, value in COMMON_VALUES.items() if name not in self.varies}
        where = f"in family '{self.name}'"
        rules = [(getattr(model, name) == value, name, f"must be {format_setting(value)} {where}")
                 for name, value in (fixed | self.structure).items()]
        rules.append((not self.needs_shared_expert or model.num_shared_experts >= 1, "num_shared_experts",
                      f"must be at least 1 {where}"))
        p = find_broken_rules(model, "model", *rules)
        for item in self.config:
            try:
                # Items raise for models that they cannot write.
                item.write(model)
            except UserError as e:
                p.append(SettingsProblem(ProblemCode.RULE, "", str(e)))
            except (TypeError, ValueError, ArithmeticError):
                if not model.problems():  # e.g. a division by a width of 0, which is a problem already
                    raise
        return p

    def check(self, model: ModelConfig) -> None:
        """Raise `SettingsError` for all rules that `model` violates, in general and for this family."""
        problems = ([problem.with_prefix("model") for problem in find_declaration_problems(model)]
                    or model.problems() + self.problems(model))
        if problems:
            raise SettingsError(f"model of family '{self.name}'", problems)

    def to_hf_config(self, model: ModelConfig, dtype: str, tokens: TokenIds) -> dict[str, Any]:
        """Return config.json's content.

        Args:
            model: architecture.
            dtype: dtype name of the weights, e.g. "bfloat16".
            tokens: special token ids.

        Raises:
            SettingsError: the family cannot express `model`; the message names every field.
        """
        self.check(model)
        config = self._write_config(model, dtype, tokens)
        extra_layers = range(model.num_mtp_layers if self.has_mtp_after_trunk() else 0)
        tensor_names = [f"model.layers.{model.num_layers + i}." for i in extra_layers]
        try:  # read the written config back, to find a lossy config map before weights are exported
            read_back = self._read_config(config, tensor_names)
        except UserError as e:
            raise UserError(f"model family {self.name!r}: cannot read back the config.json that it writes "
                            f"({e}); correct the family's items") from None
        defaults = {f.name: None if f.default is MISSING else f.default for f in fields(model)}
        lost = []
        for name in sorted(find_computed_fields(model)):
            value = getattr(model, name)
            found = _normalize_value(name, read_back.get(name, defaults[name]), model)
            if found != _normalize_value(name, value, model):
                lost.append(f"model.{name} = {value!r} (reads back as {read_back.get(name, 'nothing')!r})")
        if lost:
            raise UserError(f"model family {self.name!r}: its config.json would describe another model than "
                            f"{', '.join(lost)}; add an item for each to the family's config, or the field "
                            "to its structure")
        return config

    def _write_config(self, model: ModelConfig, dtype: str, tokens: TokenIds) -> dict[str, Any]:
        config: dict[str, Any] = {
            "architectures": [self.hf_classes[0]], "model_type": self.name, "dtype": dtype, "use_cache": True,
            "bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
        for item in self.config:
            # Later items override earlier items and the fields above.
            config |= item.write(model)
        return config

    def from_hf_config(self, config: dict[str, Any], tensor_names: Iterable[str] = ()) -> ModelConfig:
        """Return the architecture described by a config.json.

        Args:
            config: parsed config.json.
            tensor_names: the folder's tensor names, which reveal a multi-token prediction layer that
                config.json does not mention.

        Raises:
            UserError: a field is unknown, missing, of a wrong type or not supported; the message names it.
        """
        model = from_dict({"recipe": "from-hf", "model": self._read_config(config, tensor_names)}).model
        self.check(model)
        return model

    def _read_config(self, config: dict[str, Any], tensor_names: Iterable[str]) -> dict[str, Any]:
        """Return the `ModelConfig` fields described by a config.json, see `from_hf_config`."""
        # null means a missing field, but has a meaning of its own in these (is_causal: false)
        with_null = {"is_causal", *(name for item in self.config for name in getattr(item, "null_tells", ()))}
        config = {name: value for name, value in config.items() if value is not None or name in with_null}
        # Items must not read ignored fields, e.g. `sliding_window_pattern` for families without it.
        config = _drop_fields(config, tuple(self.find_ignored_fields(config)))
        architectures = config.get("architectures", self.hf_classes)
        if not isinstance(architectures, (list, tuple)) or any(
                name not in self.hf_classes for name in architectures):
            raise UserError(f"config.json: architectures = {config['architectures']}, but model_type "
                            f"'{self.name}' is {self.hf_classes[0]}; make them agree")
        tensor_names = list(tensor_names)
        if self.has_mtp_after_trunk() and tensor_names:
            config = _drop_fields(config, PREDICTION_NAMES) | {
                PREDICTION_NAMES[0]: _count_layers_after_trunk(config.get("num_hidden_layers"), tensor_names)}
        elif "num_mtp_layers" not in self.structure and any(n.startswith("mtp.") for n in tensor_names):
            config.setdefault(PREDICTION_NAMES[0], 1)
        model_fields: dict[str, Any] = {"family": self.name, **self.structure, **self.training}
        for item in self.config:
            try:
                model_fields |= item.read(config)
            except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as e:
                wrong = ", ".join(f"{name} = {config[name]!r}" for name in item.names if name in config)
                raise UserError(f"config.json: {wrong} cannot be read ({type(e).__name__}: {e}); "
                                "restore it from its source") from None
        return model_fields

    def find_ignored_fields(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the config.json fields without a config item and without effect; `UserError` names all other
        unknown fields.

        A field has no effect if transformers' source for this family neither declares nor reads it, or if it
        has its value in `HARMLESS_FIELDS`. For families unknown to transformers, and for folders with
        modelling code, only `HARMLESS_FIELDS` and `FOREIGN_PREFIXES` are accepted.
        """
        read_fields, known = load_transformers_fields(), {name for item in self.config for name in item.names}
        auto_map = config.get("auto_map")
        own_code = isinstance(auto_map, dict) and any(name.startswith("AutoModel") for name in auto_map)
        window = "sliding_attention" if config.get("sliding_window") else "full_attention"
        harmless = HARMLESS_FIELDS | {"layer_types": [window] * len(config.get("layer_types") or ())}
        ignored, reasons = {}, []
        for name, value in config.items():
            if name in known or (value is None and name != "is_causal"):
                continue
            if name in harmless and harmless[name] in (ANY_VALUE, value):
                ignored[name] = value
            elif name in read_fields["shared"] | read_fields.get(self.name, frozenset()):
                reasons.append(f"{name} = {value!r} (read by transformers, but not supported)")
            elif name.startswith(FOREIGN_PREFIXES) or (self.name in read_fields and not own_code):
                ignored[name] = value
            else:
                whose = "the folder's own code" if own_code else f"a program that has family '{self.name}'"
                reasons.append(f"{name} = {value!r} ({whose} may read it{suggest_spelling(name, known)})")
        if reasons:
            raise UserError(f"config.json: {'; '.join(reasons)}; remove a field if it has no effect on the "
                            "model, else the model is not supported")
        return ignored

    def find_carried_fields(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the config.json fields without meaning for `ModelConfig`, which exports copy."""
        unused = {name for item in self.config if isinstance(item, Unused) and item is not FOLDER_FIELDS
                  for name in item.names if name not in PREDICTION_NAMES}
        carried = {name: value for name, value in config.items() if name in unused and value is not None}
        return carried | self.find_ignored_fields(config)

    def find_undefined_fields(self) -> list[str]:
        """Return the `ModelConfig` fields that the family neither fixes nor reads from config.json; [] if its
        items cannot be tried on a small model."""
        defined = {"family", *TRAINING_FIELDS, "mtp_attention", *self.structure, *self.training,
                   *(name for name in COMMON_VALUES if name not in self.varies)}
        sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
                 "head_dim": 8}
        model = ModelConfig(**{"family": self.name, **sizes, **self.structure, **self.training})
        try:
            written = self._write_config(model, "float32", TokenIds())
            defined |= self._read_config(written, ()).keys()
        except (UserError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError):
            return []  # the family has no model of these sizes; the first export checks the fields
        computed = find_computed_fields(model)
        return [f.name for f in fields(model) if f.name in computed and f.name not in defined]


def find_computed_fields(model: ModelConfig) -> set[str]:
    """Return the `ModelConfig` fields with an effect on `model`'s output."""
    unused = {*TRAINING_FIELDS}
    if not model.num_moe_layers() and not model.num_mtp_moe_layers():
        unused |= {*EXPERT_FIELDS}
    if not model.num_mtp_layers:
        unused |= {*PREDICTION_FIELDS}
    if "L" not in model.attention_pattern + (model.mtp_attention if model.num_mtp_layers else ""):
        unused.add("sliding_window_tokens")
    if not model.has_dense_layers():
        unused.add("dense_ffn_dim")
    return {f.name for f in fields(model)} - unused


def _normalize_value(name: str, value: Any, model: ModelConfig) -> Any:
    """Return a field's value as JSON; `attention_pattern` is expanded to `model`'s layers."""
    if name == "attention_pattern" and value:
        return (value * model.num_layers)[:model.num_layers]
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return json.loads(json.dumps(plain))


def _drop_fields(config: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def _count_layers_after_trunk(num_layers: Any, tensor_names: list[str]) -> int:
    """Count consecutive layers stored after layer `num_layers - 1`.

    Folders saved by transformers drop these layers, although config.json still counts them.
    """
    count = 0
    while isinstance(num_layers, int) and any(
            name.startswith(f"model.layers.{num_layers + count}.") for name in tensor_names):
        count += 1
    return count
