"""`megatron-sov generate` with pictures and sounds, shown or made."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sov.commands.media_options import check_media, media_decoders, shown_media
from megatron_sov.errors import ExitCode, UserError
from megatron_sov.generate.engine import MEGATRON
from megatron_sov.generate.request import Batching, Sampling
from megatron_sov.media.vocabulary import AUDIO, IMAGE
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.settings import SettingsError


def asks_for_media(args: argparse.Namespace) -> bool:
    """Return whether a command shows media, or has some made."""
    return bool(args.image or args.audio or args.out_image or args.out_audio)


def run_with_media(args: argparse.Namespace) -> int:
    """Answer the prompts, each with all the media before it; print text and files.

    Raises:
        UserError: an option does not go with media, or see `media_replies.replies`.
    """
    out = {kind: folder for kind, folder in ((IMAGE, args.out_image), (AUDIO, args.out_audio))
           if folder is not None}
    _check(args)
    check_media(args, out)
    files = [(kind, file) for kind, given in ((IMAGE, args.image), (AUDIO, args.audio)) for file in given]
    root = _root([file for _, file in files])
    parts: list[dict[str, Any]] = [{"type": kind, "path": str(Path(os.path.abspath(file)).relative_to(root))}
                                   for kind, file in files]
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    if problems := sampling.problems() + Batching(args.batch_size, args.prefill_tokens).problems():
        raise SettingsError("generate", problems)
    refuse_missing(args.target)
    from megatron_sov.mcore.parallel.cpu_shims import prepare_megatron

    prepare_megatron()
    from megatron_sov.generate.media_replies import Asking, replies
    from megatron_sov.generate.target import find_target

    asking = Asking(shown_media(args, root), media_decoders(args), out, sampling, chat=args.chat,
                    max_audio_tokens=args.max_audio_tokens,
                    batching=Batching(args.batch_size, args.prefill_tokens),
                    with_features=not args.no_features)
    prompts = [[*parts, *([{"type": "text", "text": text}] if text else [])] for text in args.prompt or [""]]
    found = replies(find_target(args.target), prompts, asking, settings=args.settings, nproc=args.nproc)
    if found is None:
        return ExitCode.OK  # the job's first process prints
    if args.json:
        print(json.dumps([{"prompt": prompt, "text": reply.text,
                           "pictures": list(map(str, reply.made.pictures)),
                           "sounds": list(map(str, reply.made.sounds)),
                           "broken_pictures": reply.made.num_broken}
                          for prompt, reply in zip(args.prompt or [""], found, strict=True)],
                         ensure_ascii=False, indent=1))
        return ExitCode.OK
    for reply in found:
        if reply.text:
            print(reply.text)
        for file in (*reply.made.pictures, *reply.made.sounds):
            print(f"wrote {file}")
        if reply.made.num_broken:
            print(f"{reply.made.num_broken} pictures broke off; raise --max-new-tokens")
    return ExitCode.OK


def _check(args: argparse.Namespace) -> None:
    taken = (("--prompts", args.prompts), ("--speculative", args.speculative), ("--output", args.output),
             ("--samples", args.samples > 1), ("--stop", args.stop), ("--logprobs", args.logprobs),
             ("--run", args.run))
    for option, value in taken:
        if value:
            raise UserError(f"{option}: does not go with media; leave it out (`eval media` asks many "
                            "prompts)")
    if args.engine not in (None, MEGATRON):
        raise UserError(f"--engine {args.engine}: it does not keep blocks of media whole; use megatron")
    if not (args.prompt or args.image or args.audio):
        raise UserError("there is nothing to answer: pass --prompt TEXT, --image FILE or --audio FILE")


def _root(files: Sequence[Path]) -> Path:
    """Return the folder that all media lie in."""
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: is no file; name a picture or a sound")
    return Path(os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
                if files else os.getcwd())
