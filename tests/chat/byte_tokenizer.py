"""A tokenizer of single bytes, whose ids 0 to 255 are the bytes."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def build_byte_tokenizer(*special_tokens: str | AddedToken) -> Tokenizer:
    """Return a tokenizer of single bytes with special tokens, which have the ids from 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) if isinstance(token, str) else token
                                  for token in special_tokens])
    return tokenizer
