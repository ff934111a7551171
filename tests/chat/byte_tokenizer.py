"""Byte-level tokenizers: one of single bytes, whose ids 0 to 255 are the bytes, and ones with merges."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers


def build_byte_tokenizer(*special_tokens: str | AddedToken) -> Tokenizer:
    """Return a tokenizer of single bytes with special tokens, which have the ids from 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = _build_tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) if isinstance(token, str) else token
                                  for token in special_tokens])
    return tokenizer


def train_tokenizer(text: str, vocab_size: int, *special_tokens: str) -> Tokenizer:
    """Return byte-level BPE that is trained on a text, with special tokens, which have the ids from 0."""
    tokenizer = _build_tokenizer(models.BPE())
    tokenizer.train_from_iterator([text] * 20, trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special_tokens)))
    return tokenizer


def _build_tokenizer(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
