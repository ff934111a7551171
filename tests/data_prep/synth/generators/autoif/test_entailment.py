"""A local model for natural language inference gives the label that transformers gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast)

from data_prep.synth.generators.autoif.constraints import Entailment
from megatron_sov.base.errors import UserError

WORDS = ["use", "no", "commas", "two", "lines", "write", "a", "dot", "at", "the", "end"]


def model_in(folder: Path, labels: list[str]) -> Path:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS) + 1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=64, initializer_range=1.0,
                        id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})
    BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit('was run')")
    return folder


def test_labels_are_those_of_the_model(tmp_path: Path) -> None:
    folder = model_in(tmp_path, ["entailment", "neutral", "Contradiction"])
    ours = Entailment(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    seen = set()
    for i in range(len(WORDS) - 3):
        premise, hypothesis = " ".join(WORDS[i:i + 2]), " ".join(WORDS[i + 1:i + 4])
        with torch.inference_mode():
            place = int(model(**tokenizer(premise, hypothesis, return_tensors="pt")).logits.argmax())
        seen.add(place)
        assert ours.label(premise, hypothesis) == model.config.id2label[place].lower()
    assert len(seen) > 1


def test_a_model_without_that_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no classifier can be loaded"):
        Entailment(tmp_path)
    with pytest.raises(UserError, match="its labels are yes, no, and none is contradiction"):
        Entailment(model_in(tmp_path, ["yes", "no"]))
