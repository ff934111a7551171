"""Runs the `megatron-sov codec` actions."""

from megatron_sov.commands.models.codec import KIND_OPTIONS, CodecImportOptions, ReconstructOptions
from megatron_sov.omni.codecs.published import import_codec
from megatron_sov.omni.generation.reconstruction import reconstruct_media


def import_files(options: CodecImportOptions) -> None:
    values = {argument: getattr(options, name) for name, (argument, _) in KIND_OPTIONS.items()}
    arguments = {argument: value for argument, value in values.items() if value is not None}
    import_codec(options.kind, options.source, options.output, overwrite=options.overwrite, **arguments)
    print(f"wrote codec {options.output}")


def reconstruct_files(options: ReconstructOptions) -> None:
    for file in reconstruct_media(options.codec, options.files, options.output):
        print(f"wrote {file}")
