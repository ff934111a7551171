"""Ready scripts: the stages of a chain as files for `sbatch`, which any folder and any Python with the
package will do for."""

from __future__ import annotations

from pathlib import Path

from megatron_sov.artifacts import atomic_write, disk_errors
from megatron_sov.errors import UserError
from megatron_sov.slurm.chain import links_of
from megatron_sov.slurm.stages import Commands, SubmitOptions


def write_scripts(chain: str, folder: Path, options: SubmitOptions, commands: Commands) -> list[Path]:
    """Write the scripts of a chain; returns them in the order in which they are submitted.

    Args:
        chain: name of one that comes with the package, or a file.
        folder: where they go; as it is given it stands in their comments.
        options: the command line's, which name the folder too.
        commands: the parsers of the stages' commands.

    Raises:
        UserError: something about the chain does not fit, or a script of that name, which may have been
            changed, is there.
    """
    links = links_of(chain, options, commands)
    scripts = {job.script: text for link in links
               for job, text in zip(link.prepared.jobs, link.prepared.texts, strict=True)}
    if there := [path for path in scripts if path.exists()]:
        raise UserError(f"{there[0]}: is there already, and may have been changed; "
                        "remove it, or choose another --scripts folder")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for path, text in scripts.items():
        atomic_write(path, text)
    return list(scripts)
