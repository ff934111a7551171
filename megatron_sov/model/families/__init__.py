"""Model families: declarations that map weights and config of a model to a Hugging Face folder."""
