"""Runs `megatron-sov generate` with pictures or sounds in prompts or replies."""

import json
from pathlib import Path

from megatron_sov.chat.media_tokens import AUDIO, IMAGE
from megatron_sov.commands.models.generate import CodecsOptions, MediaRequest
from megatron_sov.infer.engines.target import find_target
from megatron_sov.omni.generation.prompts import PromptMediaEncoder
from megatron_sov.omni.generation.replies import MediaDecoders, MediaGeneration, generate_replies


def generate_media(request: MediaRequest) -> None:
    """Answer every prompt, preceded by the media from the command line; print texts and file paths. Raises
    `UserError`: a missing codec; see `generate_replies`."""
    options = request.options
    generation = MediaGeneration(
        build_prompt_media_encoder(options, request.root), build_media_decoders(options),
        request.output_folders, options.sampling, chat=options.chat, batching=options.batching,
        max_audio_tokens=options.max_audio_tokens, with_features=not options.no_features)
    texts = options.prompt or ("",)
    prompts = [[*request.parts, *([{"type": "text", "text": text}] if text else [])] for text in texts]
    results = generate_replies(find_target(options.target), prompts, generation, settings=options.settings,
                               nproc=options.nproc)
    if results is None:
        return  # the first rank prints
    if options.json:
        rows = [{"prompt": text, "text": reply.text, "pictures": list(map(str, reply.media.pictures)),
                 "sounds": list(map(str, reply.media.sounds)), "broken_pictures": reply.media.num_broken}
                for text, reply in zip(texts, results, strict=True)]
        print(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    for reply in results:
        if reply.text:
            print(reply.text)
        for file in (*reply.media.pictures, *reply.media.sounds):
            print(f"wrote {file}")
        if reply.media.num_broken:
            print(f"{reply.media.num_broken} pictures are incomplete; raise --max-new-tokens")


def build_prompt_media_encoder(options: CodecsOptions, root: Path) -> PromptMediaEncoder:
    """Build the encoders of prompts' media below `root`."""
    codecs = {IMAGE: options.image_tokenizer, AUDIO: options.audio_tokenizer}
    return PromptMediaEncoder(root, {kind: folder for kind, folder in codecs.items() if folder is not None})


def build_media_decoders(options: CodecsOptions) -> MediaDecoders:
    codecs = {IMAGE: options.image_decoder, AUDIO: options.vocoder}
    return MediaDecoders({kind: folder for kind, folder in codecs.items() if folder is not None})
