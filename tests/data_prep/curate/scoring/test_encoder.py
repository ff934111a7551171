"""An encoder in place of n-grams: the mean of its last hidden states, and a scorer that carries it along."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

from data_prep.curate.scoring.encoder import EncoderSettings, ScoringEncoder, copy_encoder
from data_prep.curate.scoring.scorer import TrainSettings, load_scorer, scorer_files, train
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from tests.data_prep.curate.scoring.planted import BAD, BAD_KO, FILLER, FILLER_KO, GOOD, GOOD_KO

TEXT = "because the theorem explains the house"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a small encoder with chance weights, which knows the planted words."""
    target = tmp_path_factory.mktemp("encoder")
    words = ["[UNK]", ".", *GOOD, *BAD, *FILLER, *GOOD_KO, *BAD_KO, *FILLER_KO]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(target)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=32, max_position_embeddings=64)).save_pretrained(target)
    (target / "modeling_evil.py").write_text("raise SystemExit('was run')")
    return target


def test_a_row_is_the_mean_of_the_last_hidden_states(folder: Path) -> None:
    encoder = ScoringEncoder(folder, EncoderSettings(max_tokens=4))
    ids = PreTrainedTokenizerFast.from_pretrained(folder)(TEXT)["input_ids"]
    assert len(ids) == 6
    with torch.inference_mode():
        states = AutoModel.from_pretrained(folder)(torch.tensor([ids[:4]])).last_hidden_state
    np.testing.assert_allclose(encoder.embed(TEXT), states[0].mean(0).numpy(), atol=1e-6)
    weights = np.arange(32, dtype=np.float32)
    assert encoder.dot(TEXT, weights) == pytest.approx(float(encoder.embed(TEXT) @ weights), rel=1e-5)
    assert not encoder.embed("").any()


def test_a_scorer_carries_its_encoder_along(folder: Path, labels_file: Callable[..., Path],
                                            tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "moved")
    settings = TrainSettings(labels_file(count=120), "classifier", EncoderSettings(max_tokens=60), moved)
    content = train(settings, tmp_path / "scorer")
    shutil.rmtree(moved)
    assert content["heldout"]["auc"] > 0.8
    scorer = load_scorer(tmp_path / "scorer")
    assert scorer.score("theorem explains evidence") > scorer.score("click login casino")
    names = {str(p.relative_to(tmp_path / "scorer")) for p in scorer_files(tmp_path / "scorer")}
    assert "encoder/model.safetensors" in names
    assert not any(name.endswith(".py") for name in names)
    assert set(read_manifest(tmp_path / "scorer").files) == names


def test_what_is_no_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        broken = shutil.copytree(folder, tmp_path / name)
        (broken / name).unlink()
        with pytest.raises(UserError, match="name the folder of a Hugging Face encoder"):
            copy_encoder(broken, tmp_path / "target")
    broken = shutil.copytree(folder, tmp_path / "cut")
    (broken / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"cut/model\.safetensors: cannot be read as a safetensors file"):
        ScoringEncoder(broken, EncoderSettings())


def test_a_text_beyond_the_encoders_positions_is_told(folder: Path) -> None:
    with pytest.raises(UserError, match=r"the encoder fails on a text of 90 tokens .*; lower --max-tokens"):
        ScoringEncoder(folder, EncoderSettings()).embed("the " * 90)
