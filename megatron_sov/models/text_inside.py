"""Text models inside folders of models that see: which tensors are theirs, and under which names, and what
config.json says of them.  Such a folder is read as the text model, and written as a folder of it alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_sov.errors import UserError

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
