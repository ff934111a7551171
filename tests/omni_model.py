"""A random model that reads and writes images and audio, as a checkpoint, and codecs with few entries."""

from pathlib import Path

import torch

from megatron_sov import recipes
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.model.config import apply_settings
from megatron_sov.omni.codecs.published import import_codec
from tests.omni import hf_folders
from tokenizer.media import MediaTokens, add_media

GRID, NUM_PICTURE_TOKENS, NUM_SOUND_TOKENS = 4, 16, 512


def save_codecs(pictures: Path, sounds: Path) -> None:
    """Write codecs with random weights of pictures of 16 x 16 pixels and of sounds."""
    for kind, folder in (("vqmodel", pictures), ("dac", sounds)):
        hf_folders.save_network(kind, folder.with_name(f"{folder.name}-hf"))
        import_codec(kind, folder.with_name(f"{folder.name}-hf"), folder)


def save_omni_model(path: Path, plain_tokenizer: Path, settings: tuple[str, ...] = (), *,
                    likes: tuple[str, ...] = ()) -> None:
    """Write a drawn model as a checkpoint; called with the environment of one rank.

    Args:
        path: the checkpoint; its tokenizer is written beside it.
        plain_tokenizer: artifact that gets tokens of media.
        settings: `key=value` changes of tiny-hyperclova-omni.
        likes: tokens that it writes much more often than any other.
    """
    from tokenizers import Tokenizer

    from megatron_sov.checkpoint import initial_weights
    from megatron_sov.engine.model.language_model import build_run_model
    from megatron_sov.engine.parallel import world
    from tests.checkpoints import save_checkpoint

    tokenizer = path.with_name(f"{path.name}-tokenizer")
    add_media(plain_tokenizer, tokenizer, MediaTokens(NUM_SOUND_TOKENS, NUM_PICTURE_TOKENS))
    words = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    blocks = read_manifest(tokenizer).content["media"]
    ids = {name: words.token_to_id(f"<|{name}_PAD|>") for name in ("IMAGE", "VIDEO", "AUDIO")}
    config = apply_settings(recipes.get("tiny-hyperclova-omni"), [
        f"model.vocab_size={words.get_vocab_size()}", "model.hidden_size=32", "model.num_heads=2",
        "model.num_kv_heads=2", "model.head_dim=16", "model.dense_ffn_dim=48", "model.num_layers=2",
        "data.paths={}",
        f"model.vision.placeholder_ids=[{ids['IMAGE']},{ids['VIDEO']}]",
        f"model.audio.placeholder_ids=[{ids['AUDIO']}]",
        *(f"model.{kind}_tokens.{name}={block[name]}" for kind, block in blocks.items()
          for name in ("first", "size")), *settings])
    world.join_world(config.parallel)
    try:
        model = build_run_model(config)
        initial_weights.initialize_weights(model, config.model, 1)
        if likes:
            # all hidden states have one direction, and so do the output rows of preferred tokens
            with torch.no_grad():
                model.chunks[0].embedding.word_embeddings.weight.add_(1.0)
                for name in likes:
                    model.chunks[0].output_layer.weight[words.token_to_id(name)] = 0.2
        save_checkpoint(path, model, None, {"step": 1, "tokens": 0}, config.to_dict(), tokenizer)
    finally:
        world.leave_world()
