"""A run as a cluster's jobs: an array of workers, each with its share of the units, and a last job that
writes the artifact.  The same command, typed again, tells how far they are or goes on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from data_prep.media.finishing import KIND
from data_prep.media.running import MADE_BY, Order, encode_units, finished
from data_prep.media.units import UnitEncoder, plan
from megatron_sov.artifacts import MANIFEST, read_manifest
from megatron_sov.work.arrays import (
    FINISH_CPUS,
    ClusterOptions,
    SharedWork,
    profile_of,
    refuse_many_restarts,
    submit_shares,
)
from megatron_sov.work.parts import begin_parts, open_parts


@dataclass(frozen=True)
class EncodeShare:
    """The work of the array: every `num_workers`-th unit."""

    order: Order
    num_workers: int

    def __call__(self, task: int) -> None:
        """Make the units of one worker."""
        refuse_many_restarts("sov-data encode-media", "take more --workers")
        encoder = UnitEncoder(self.order.settings, self.order.work, self.order.threads)
        try:
            encode_units(encoder, list(plan(self.order.files()))[task::self.num_workers], shows=False)
        finally:
            encoder.close()


@dataclass(frozen=True)
class FinishMedia:
    """The work of the last job."""

    order: Order

    def __call__(self, task: int) -> None:
        """Write the artifact."""
        with open_parts(self.order.output, MADE_BY):
            finished(self.order, list(plan(self.order.files())), self.order.settings.identity())


def submit_order(order: Order, where: ClusterOptions, num_workers: int) -> None:
    """Submit what is not done, or tell how far jobs are that work on it.

    Args:
        order: what was asked for; its paths are on a disk that all nodes see.
        where: it is submitted to.
        num_workers: jobs of the array.

    Raises:
        UserError: the profile, the order or the cluster are in the way.
    """
    order = _absolute(order)
    profile = profile_of(where)
    if (order.output / MANIFEST).is_file() and not order.overwrite:
        read_manifest(order.output, KIND)
        print(f"{order.output}: complete from before")
        return
    units = order.ready()
    encoder = UnitEncoder(order.settings, order.work, order.threads)
    submit_shares(order.output, SharedWork(
        "encode", "encode-media", len(units), "units",
        num_done=lambda: sum(map(encoder.is_done, units)), begin=lambda: begin_parts(order.output, MADE_BY),
        share=partial(EncodeShare, order), finish=FinishMedia(order),
        cpus=min(profile.cpus_per_node, order.threads + 1),
        gpus=int(order.settings.device.startswith("cuda")),
        finish_cpus=min(profile.cpus_per_node, FINISH_CPUS)), profile, num_workers)


def _absolute(order: Order) -> Order:
    """Return an order whose paths hold on other nodes."""
    images, sounds = order.settings.image_tokenizer, order.settings.audio_tokenizer
    settings = replace(order.settings, media_root=order.settings.media_root.absolute(),
                       image_tokenizer=images and images.absolute(),
                       audio_tokenizer=sounds and sounds.absolute())
    return replace(order, output=order.output.absolute(), settings=settings,
                   inputs=tuple(path.absolute() for path in order.inputs))
