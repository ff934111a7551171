"""Networks between media and tokens: tokenizers, which see and hear, and decoders, which draw and speak."""
