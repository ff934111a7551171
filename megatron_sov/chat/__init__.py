"""Chat templates, tool calls, special tokens and tokenizer identity."""
