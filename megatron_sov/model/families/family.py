"""A model family: how its weights and its config map to Hugging Face, as data."""

from __future__ import annotations

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
from megatron_sov.model.families.weights import Link, WeightSection, links

# Text models inside folders of models that see: which tensors are theirs, and under which names, and what
# config.json says of them.  Such a folder is read as the text model, and written as a folder of it alone.

OUTER = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings")
"""Fields that the folder's config.json has beside the text model's, and that are of the text model too."""


@dataclass(frozen=True)
class TextInside:
    """Where a text model stands in folders of one kind."""

    hf_class: str
    """Transformers' class of the folder."""
    family: str
    """Family of the text model."""
    renamed: tuple[tuple[str, str], ...]
    """Beginnings of the text model's tensor names, and what the family has in their place."""
    others: tuple[str, ...]
    """Beginnings of all other tensors' names."""
    defaults: dict[str, Any]
    """What transformers assumes where `text_config` is silent, of fields that the family's declaration
    requires."""

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the text model's config.json.

        Raises:
            UserError: it has none, is of another model, or the two parts disagree.
        """
        said = config.get("text_config")
        if not isinstance(said, dict):
            raise UserError(f"config.json: text_config = {said!r}, but a folder of {self.hf_class} has its "
                            "text model's settings there; restore it from its source")
        if said.get("model_type", self.family) != self.family:
            raise UserError(f"config.json: text_config.model_type = {said['model_type']!r}, but only "
                            f"{self.family!r} is read out of a folder of {self.hf_class}")
        if config.get("architectures", [self.hf_class]) != [self.hf_class]:
            raise UserError(f"config.json: architectures = {config['architectures']}, but model_type "
                            f"{config['model_type']!r} is {self.hf_class}; make them agree")
        tied = [part["tie_word_embeddings"] for part in (config, said)
                if part.get("tie_word_embeddings") is not None]
        if len(tied) > 1 and tied[0] != tied[1]:
            raise UserError(f"config.json: tie_word_embeddings = {tied[0]}, and {tied[1]} in text_config; "
                            "make them agree")
        # The folder's own ids win over those of the text part; its class does not.
        outer = {name: config[name] for name in OUTER if config.get(name) is not None}
        inner = {name: value for name, value in said.items() if name != "architectures"}
        return {**self.defaults, **inner, **outer, "model_type": self.family}

    def names(self, found: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """Return the family's name -> the folder's of each tensor of the text model and of each that belongs
        to nothing known, and the folder's names of those that are left out.

        Raises:
            UserError: two tensors would have one name.
        """
        ours: dict[str, str] = {}
        left_out = []
        for name in found:
            if name.startswith(self.others):
                left_out.append(name)
                continue
            # The first beginning that matches counts.
            own = next((new + name.removeprefix(old) for old, new in self.renamed if name.startswith(old)),
                       name)
            if own in ours:
                raise UserError(f"{ours[own]} and {name} are both {own} of the text model; remove one of "
                                "them")
            ours[own] = name
        return ours, left_out


TEXT_INSIDE = {
    "gemma3": TextInside(
        "Gemma3ForConditionalGeneration", "gemma3_text",
        # as released, and as transformers 5 has them in memory
        (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."),
         ("model.language_model.", "model.")),
        ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
        {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
         "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131072}),
}
"""model_type of a folder -> the text model in it."""


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a config.json says of its text model: that of a model that sees says it in a part, any
    other one as a whole."""
    inside = TEXT_INSIDE.get(str(config.get("model_type")))
    return config if inside is None else inside.config(config)


# Fields of a config.json that no item of a family answers for.

ANY = object()
HARMLESS: dict[str, Any] = {
    # how a program runs a model, names of files, heads of classifiers, initial weights of a new model
    **dict.fromkeys((
        "_attn_implementation", "_attn_implementation_internal", "attn_implementation",
        "_experts_implementation", "_experts_implementation_internal", "experts_implementation",
        "gradient_checkpointing", "_commit_hash", "name_or_path", "id2label", "label2id", "num_labels",
        "problem_type", "classifier_dropout", "hidden_dropout", "token_classification_bias", "sep_token_id",
        "init_std", "initializer_factor", "return_dict"), ANY),
    "chunk_size_feed_forward": 0, "is_causal": True, "is_encoder_decoder": False, "num_mtp_layers": 0,
    "output_attentions": False, "output_hidden_states": False, "partial_rotary_factor": 1.0}
"""Fields that transformers reads for all families -> the value (or `ANY`) that changes no logit."""
OF_OTHER_PROGRAMS = ("_", "transformers.js_", "unsloth_")
"""Beginnings of the names of fields that programs write for themselves."""


@cache
def transformers_fields() -> dict[str, frozenset[str]]:
    """Return family -> the config.json fields that transformers' source for it declares or reads; "shared":
    those that its source for all families does (`tests/freeze_fields.py` writes the table)."""
    table = Path(__file__).with_name("transformers_fields.json")
    return {name: frozenset(names) for name, names in json.loads(table.read_text(encoding="utf-8")).items()}


MAX_POSITIONS = Renamed("max_position_embeddings", "max_position_tokens")
OF_EVERY_FOLDER = Unused((
    "model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "output_router_logits", "bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class",
    "_name_or_path", "auto_map"))
"""Fields that every export has anew, or that are of one folder alone."""
COMMON_CONFIG: tuple[ConfigItem, ...] = (
    Renamed("vocab_size", "vocab_size"), Renamed("hidden_size", "hidden_size"),
    Renamed("num_hidden_layers", "num_layers"), Renamed("num_attention_heads", "num_heads"),
    MAX_POSITIONS, Renamed("initializer_range", "init_std", 0.02),
    Fixed("attention_dropout", 0.0),
    Encoders(), OF_EVERY_FOLDER,
)
"""What all families here have in common."""
DECODER_CONFIG: tuple[ConfigItem, ...] = (*COMMON_CONFIG, Fixed("hidden_act", "silu"))
"""What nearly all have in common."""
KV_HEADS = Renamed("num_key_value_heads", "num_kv_heads")
"""Required: where it is null transformers takes all heads, and where it is absent another number in each
family."""
EXPERTS_CONFIG: tuple[ConfigItem, ...] = (
    Renamed("num_experts_per_tok", "num_experts_per_token", 8),
    Renamed("moe_intermediate_size", "expert_ffn_dim"), Fixed("attention_bias", False, written=False),
)
"""What those with experts have in common."""
DEEPSEEK_ROUTER_CONFIG: tuple[ConfigItem, ...] = (
    Fixed("norm_topk_prob", True),
    Renamed("n_group", "num_expert_groups", 1), Renamed("topk_group", "num_groups_per_token", 1),
    Fixed("scoring_func", "sigmoid", written=False), Fixed("topk_method", "noaux_tc", written=False),
)
DEEPSEEK_ROUTER = {"router_score": "sigmoid", "router_bias": True, "norm_topk_prob": True}
"""Routing as in DeepSeek-V3: config fields, and the fields of `ModelConfig` that it fixes."""
EXPERT_GROUPS = ("num_expert_groups", "num_groups_per_token")
"""Those that its config fields read and write, for `Family.varies`."""

OF_TRAINING = ("router_bias_update_rate", "seq_aux_loss_coeff", "mtp_loss_coeff", "init_std")
"""Fields of an architecture that say how it is trained, not what it computes."""
OF_EXPERTS = ("num_experts_per_token", "num_expert_groups", "num_groups_per_token", "num_shared_experts",
              "expert_ffn_dim", "router_score", "norm_topk_prob", "router_bias", "routed_scaling_factor")
OF_PREDICTION = ("mtp_experts", "mtp_attention", "mtp_depths")
"""Fields that change nothing of a model without experts, and of one without prediction layers."""

PLAIN: dict[str, Any] = {
    "block_norms": "pre", "embedding_multiplier": 1.0, "attention_multiplier": None,
    "residual_multiplier": 1.0, "logits_multiplier": 1.0, "rope_share": 1.0,
    "logits_softcap": None, "local_rope_theta": None, "zero_centered_norms": False, "activation": "silu",
    "layer_windows": (), "swiglu_limits": (), "mtp_depths": 1, "num_expert_groups": 1,
    "num_groups_per_token": 1, "mtp_experts": False, "latent_attention": None, "linear_attention": None,
    "attention_output_gate": False}
"""Fields of `ModelConfig` that few families can vary, with the value that all others have."""


@dataclass(frozen=True)
class TokenIds:
    """The token ids that a Hugging Face config carries; None where unknown."""

    bos: int | None = None
    eos: int | list[int] | None = None
    pad: int | None = None


@dataclass(frozen=True)
class Family:
    """A family's declaration."""

    name: str
    """Equal to transformers' `model_type`."""
    hf_classes: tuple[str, ...]
    """Accepted names of the transformers class; the first one is written."""
    weights: tuple[WeightSection, ...]
    """The weight map."""
    config: tuple[ConfigItem, ...]
    """The config map."""
    structure: dict[str, Any]
    """Fields of `ModelConfig` that this family cannot vary, with their value."""
    varies: tuple[str, ...] = ()
    """Those of the fields `PLAIN` that its config items read and write."""
    training: dict[str, Any] = field(default_factory=dict)
    """Fields that a config.json does not carry (they only steer training), with the published value."""
    needs_shared_expert: bool = False
    """Whether transformers' model always has a shared expert."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensors of a prediction layer behind the trunk ("{l}" is its number) that are others once more -> those
    that they equal: written always, not needed where they are read."""
    respelt: tuple[tuple[str, str], ...] = ()
    """Parts of tensor names that folders may have in the place of others: theirs, ours."""
    in_memory: tuple[tuple[str, str], ...] = ()
    """Parts of module names in folders -> what transformers' model has in their place."""
    reader_split: str | None = None
    """The regular expression by which transformers' tokenizer class for this family splits text, whatever
    tokenizer.json says; None where it does what the file says."""

    def links(self, model: ModelConfig) -> list[Link]:
        """Return every block of every tensor of `model`, with its Hugging Face tensors."""
        return links(self.weights, model) + encoder_links(model)

    def copies_in(self, model: ModelConfig) -> dict[str, str]:
        """Return the tensors of a folder that are others once more -> those that they equal."""
        if not model.num_mtp_layers:
            return {}
        return {name.replace("{l}", str(model.num_layers)): other for name, other in self.copies.items()}

    def predicts_behind(self) -> bool:
        """Return whether a folder counts the prediction layer as one more layer of the trunk."""
        return any(section.where == "mtp layer behind" for section in self.weights)

    def problems(self, model: ModelConfig) -> list[SettingsProblem]:
        """Return every property of `model`, whose values lie within their bounds, that the family cannot
        express."""
        # A rare field that the config map cannot write must have its common value, else it would be lost in
        # silence.
        fixed = {name: value for name, value in PLAIN.items() if name not in self.varies} | self.structure
        p = find_broken_rules(model, "model", *(
            (getattr(model, name) == value, name,
             f"cannot be: family '{self.name}' only knows {format_setting(value)}")
            for name, value in fixed.items()), (
                not self.needs_shared_expert or model.num_shared_experts >= 1, "num_shared_experts",
                f"must be at least 1 in family '{self.name}'"))
        for item in self.config:
            try:
                # Writing is the check: an item refuses what it cannot express.
                item.write(model)
            except UserError as e:
                p.append(SettingsProblem(ProblemCode.RULE, "", str(e)))
            except (TypeError, ValueError, ArithmeticError):
                if not model.problems():  # which tell of the width that is none, say, that divides here
                    raise
        return p

    def check(self, model: ModelConfig) -> None:
        """Raise `SettingsError` with every reason why `model` is not sound or not of this family."""
        problems = ([problem.with_prefix("model") for problem in find_declaration_problems(model)]
                    or model.problems() + self.problems(model))
        if problems:
            raise SettingsError(f"model of family '{self.name}'", problems)

    def to_hf_config(self, model: ModelConfig, dtype: str, tokens: TokenIds) -> dict[str, Any]:
        """Return the content of config.json.

        Args:
            model: the architecture.
            dtype: name of the weights' dtype, e.g. "bfloat16".
            tokens: ids for generation.

        Raises:
            SettingsError: the family cannot express `model`; the message names every field.
        """
        self.check(model)
        config = self._written(model, dtype, tokens)
        behind = range(model.num_mtp_layers if self.predicts_behind() else 0)
        try:
            # What is written is read back and compared: a lossy map is found before weights are exported.
            found = self._read(config, [f"model.layers.{model.num_layers + i}." for i in behind])
        except UserError as e:
            raise UserError(f"model family {self.name!r}: cannot read back the config.json that it writes "
                            f"({e}); correct the family's items") from None
        defaults = {f.name: None if f.default is MISSING else f.default for f in fields(model)}
        lost = [f"model.{name} = {getattr(model, name)!r} (it says {found.get(name, 'nothing')!r})"
                for name in sorted(computed_fields(model))
                if _plain(name, found.get(name, defaults[name]), model) != _plain(name, getattr(model, name),
                                                                                  model)]
        if lost:
            raise UserError(f"model family {self.name!r}: its config.json would describe another model than "
                            f"{', '.join(lost)}; add an item for each to the family's config, or the field "
                            "to its structure")
        return config

    def _written(self, model: ModelConfig, dtype: str, tokens: TokenIds) -> dict[str, Any]:
        config: dict[str, Any] = {
            "architectures": [self.hf_classes[0]], "model_type": self.name, "dtype": dtype, "use_cache": True,
            "bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
        for item in self.config:
            # Later items win over earlier ones and over the fields above.
            config |= item.write(model)
        return config

    def from_hf_config(self, config: dict[str, Any], tensor_names: Iterable[str] = ()) -> ModelConfig:
        """Return the architecture that a config.json describes.

        Args:
            config: the parsed config.json.
            tensor_names: names of the folder's tensors; they tell of a multi-token prediction layer where
                the config is silent.

        Raises:
            UserError: a field is unknown, missing, of the wrong type or not supported; the message names it.
        """
        model = from_dict({"recipe": "from-hf", "model": self._read(config, tensor_names)}).model
        self.check(model)
        return model

    def _read(self, config: dict[str, Any], tensor_names: Iterable[str]) -> dict[str, Any]:
        """Return the fields of a model that a config.json says, see `from_hf_config`."""
        told = {name for item in self.config for name in getattr(item, "null_tells", ())}
        told.add("is_causal")  # transformers takes null for false
        config = {name: value for name, value in config.items() if value is not None or name in told}
        # an item reads no field that is passed over, as `sliding_window_pattern` where transformers has none
        config = _without(config, tuple(self.find_passed_over(config)))
        architectures = config.get("architectures", self.hf_classes)
        if not isinstance(architectures, (list, tuple)) or any(
                name not in self.hf_classes for name in architectures):
            raise UserError(f"config.json: architectures = {config['architectures']}, but model_type "
                            f"'{self.name}' is {self.hf_classes[0]}; make them agree")
        tensor_names = list(tensor_names)
        if self.predicts_behind() and tensor_names:
            config = _without(config, PREDICTION_NAMES) | {
                PREDICTION_NAMES[0]: _layers_behind(config.get("num_hidden_layers"), tensor_names)}
        elif "num_mtp_layers" not in self.structure and any(n.startswith("mtp.") for n in tensor_names):
            config.setdefault("num_nextn_predict_layers", 1)
        found: dict[str, Any] = {"family": self.name, **self.structure, **self.training}
        for item in self.config:
            try:
                found |= item.read(config)
            except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as e:
                wrong = ", ".join(f"{name} = {config[name]!r}" for name in item.names if name in config)
                raise UserError(f"config.json: {wrong} cannot be understood ({type(e).__name__}: {e}); "
                                "restore it from its source") from None
        return found

    def find_passed_over(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of a config.json that no item answers for and that change nothing: transformers'
        source for this family neither declares nor reads them, or the value is that of `HARMLESS`.
        `UserError` names each other field.

        A family that transformers lacks, or a folder with modelling code of its own, may have fields of any
        effect: there, only fields of `HARMLESS` and `OF_OTHER_PROGRAMS` pass.
        """
        table, known = transformers_fields(), {name for item in self.config for name in item.names}
        auto_map = config.get("auto_map")
        own_code = isinstance(auto_map, dict) and any(name.startswith("AutoModel") for name in auto_map)
        window = "sliding_attention" if config.get("sliding_window") else "full_attention"
        harmless = HARMLESS | {"layer_types": [window] * len(config.get("layer_types") or ())}
        passed, reasons = {}, []
        for name, value in config.items():
            if name in known or (value is None and name != "is_causal"):
                continue
            if name in harmless and harmless[name] in (ANY, value):
                passed[name] = value
            elif name in table["shared"] | table.get(self.name, frozenset()):
                reasons.append(f"{name} = {value!r} (transformers reads it, and it is not supported here)")
            elif name.startswith(OF_OTHER_PROGRAMS) or (self.name in table and not own_code):
                passed[name] = value
            else:
                whose = "the folder's own code" if own_code else f"a program that has family '{self.name}'"
                reasons.append(f"{name} = {value!r} ({whose} may read it{suggest_spelling(name, known)})")
        if reasons:
            raise UserError(f"config.json: {'; '.join(reasons)}; remove a field if the model computes the "
                            "same without it, else the model is not supported")
        return passed

    def find_carried(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of a config.json that say nothing of our model and stand in its exports again."""
        unused = {name for item in self.config if isinstance(item, Unused) and item is not OF_EVERY_FOLDER
                  for name in item.names if name not in PREDICTION_NAMES}
        return {name: value for name, value in config.items() if name in unused and value is not None
                } | self.find_passed_over(config)

    def unsaid(self) -> list[str]:
        """Return the fields of a model that the family neither fixes nor reads out of a config.json, where
        transformers' default would count; [] where its items cannot be tried."""
        said = {"family", *OF_TRAINING, "mtp_attention", *self.structure, *self.training,
                *(name for name in PLAIN if name not in self.varies)}
        sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
                 "head_dim": 8}
        model = ModelConfig(**{"family": self.name, **sizes, **self.structure, **self.training})
        try:
            written = self._written(model, "float32", TokenIds())
            said |= self._read(written, ()).keys()
        except (UserError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError):
            return []  # no model of these sizes; the first export shows what is lost
        return [f.name for f in fields(model) if f.name in computed_fields(model) and f.name not in said]


def computed_fields(model: ModelConfig) -> set[str]:
    """Return the fields that decide what a model computes."""
    unused = {*OF_TRAINING}
    if not model.num_moe_layers() and not model.num_mtp_moe_layers():
        unused |= {*OF_EXPERTS}
    if not model.num_mtp_layers:
        unused |= {*OF_PREDICTION}
    if "L" not in model.attention_pattern + model.mtp_attention * model.num_mtp_layers:
        unused.add("sliding_window_tokens")
    if not model.has_dense_layers():
        unused.add("dense_ffn_dim")
    return {f.name for f in fields(model)} - unused


def _plain(name: str, value: Any, model: ModelConfig) -> Any:
    """Return a setting as JSON has it; a pattern of layers as those that `model` has."""
    if name == "attention_pattern" and value:
        return (value * model.num_layers)[:model.num_layers]
    as_data = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return json.loads(json.dumps(as_data))


def _without(config: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def _layers_behind(num_layers: Any, tensor_names: list[str]) -> int:
    """Return how many layers without a gap stand behind a trunk of so many.

    transformers' config says that there is one also where its model, which drops them, was saved.
    """
    found = 0
    # Counted from tensor names, since config.json says nothing of layers that transformers drops.
    while isinstance(num_layers, int) and any(
            name.startswith(f"model.layers.{num_layers + found}.") for name in tensor_names):
        found += 1
    return found
