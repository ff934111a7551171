"""The text model inside a folder of a model that sees, as transformers writes it: it is read alone, computes
the same, and what is left out is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov import convert
from megatron_sov.errors import UserError
from megatron_sov.generate.target import Target

NAMES = {"as released": ("language_model.model.", "vision_tower.", "multi_modal_projector."),
         "as in memory": ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector.")}
"""Beginnings of the names of the text model, the encoder and what stands between."""


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Gemma 3 with a vision tower."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("seeing") / "hf"
    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8,
            "sliding_window_pattern": 2, "query_pre_attn_scalar": 5, "initializer_range": 0.3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}
    model = Gemma3ForConditionalGeneration(Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90,
        boi_token_index=91, eoi_token_index=92, eos_token_id=[1, 6]))
    model.save_pretrained(folder)
    return folder


def respelled(folder: Path, names: str, out: Path, change: Callable[[dict[str, Any]], Any] = bool) -> Path:
    """Write the folder with its tensors named so, and its config.json changed."""
    out.mkdir()
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        place = next(i for i, starts in enumerate(zip(*NAMES.values(), strict=True))
                     if name.startswith(starts))
        old = next(starts[place] for starts in NAMES.values() if name.startswith(starts[place]))
        tensors[NAMES[names][place] + name.removeprefix(old)] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("names", NAMES)
def test_the_text_model_computes_what_it_computes_inside(seeing: Path, names: str, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration

    source = respelled(seeing, names, tmp_path / "hf")
    convert.from_hf(source, tmp_path / "ckpt")
    told = capsys.readouterr().err
    assert (Target(source, True).vocab_size, Target(source, True).max_tokens) == (96, 131072)
    assert "tensors of what sees pictures (" in told and told.count("are left out") == 1
    convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written["architectures"] == ["Gemma3ForCausalLM"] and written["model_type"] == "gemma3_text"
    assert written["rope_parameters"]["full_attention"] == {
        "rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    stored = load_file(source / "model.safetensors")
    text = NAMES[names][0]
    for name, tensor in load_file(tmp_path / "back/model.safetensors").items():
        assert torch.equal(tensor, stored.pop(text + name.removeprefix("model.")))
    assert not [name for name in stored if name.startswith(text)], "every tensor of the text model is there"
    tokens = torch.arange(20)[None] * 7 % 90
    with torch.no_grad():
        inside = Gemma3ForConditionalGeneration.from_pretrained(seeing)(input_ids=tokens).logits
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "back")(input_ids=tokens).logits
    torch.testing.assert_close(alone, inside, rtol=1e-5, atol=1e-5)


def part(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["text_config"].update({name: value})


@pytest.mark.parametrize(("change", "expected"), [
    (lambda config: config.pop("text_config"), "text_config = None, but a folder of Gemma3ForConditional"),
    (lambda config: config.update(architectures=["Gemma3ForSequenceClassification"]),
     r"architectures = \['Gemma3ForSequenceClassification'\], but model_type 'gemma3' is Gemma3ForCond"),
    (part("model_type", "llama"), "text_config.model_type = 'llama', but only 'gemma3_text' is read"),
    (part("tie_word_embeddings", False), "tie_word_embeddings = True, and False in text_config"),
    (part("tie_word_embeddings", [True]), r"tie_word_embeddings = True, and \[True\] in text_config"),
    (part("attn_logit_softcapping", 50.0), r"attn_logit_softcapping = 50\.0, but only None is supported"),
    (part("intermediate_size", 25), r"its tensors are not those of the model: .* of another shape"),
    (part("hidden_sice", 3), "unknown fields for family 'gemma3_text': 'hidden_sice'"),
])
def test_other_folders_are_refused_in_one_sentence(seeing: Path, change: Callable[[dict[str, Any]], Any],
                                                   expected: str, tmp_path: Path) -> None:
    source = respelled(seeing, "as released", tmp_path / "hf", change)
    with pytest.raises(UserError, match=expected):
        convert.from_hf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_there_twice_or_unknown_is_refused(seeing: Path, tmp_path: Path) -> None:
    source = respelled(seeing, "as released", tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    norm = tensors["language_model.model.norm.weight"]
    for name, expected in (("model.language_model.norm.weight", "are both model.norm.weight of the text"),
                           ("audio_tower.norm.weight", r"1 unexpected \(audio_tower\.norm\.weight\)")):
        save_file(tensors | {name: norm.clone()}, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=expected):
            convert.from_hf(source, tmp_path / "out")
