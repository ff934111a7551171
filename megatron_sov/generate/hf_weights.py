"""The weights of a loaded transformers model under the names of its files, as views of the live memory.

transformers 5 holds a layer's experts stacked, gate and up in one tensor, and renames others; files have one
tensor for each expert.  How the two correspond is its own knowledge: the conversion that `save_pretrained`
applies is run on views of the parameters, so writing into a result writes into the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from megatron_sov.convert.changed_values import Changed
from megatron_sov.convert.whole_model import checked
from megatron_sov.errors import UserError


class _View(torch.Tensor):
    """A tensor that stays where it is when transformers would lay a part of it out anew."""

    def contiguous(self, *_: Any, **__: Any) -> _View:
        return self


def live_views(model: Any) -> dict[str, torch.Tensor]:
    """Return the model's tensors by their names in files, as views of its memory.

    Raises:
        UserError: a tensor in files is more than a part of one in memory for this class of model.
    """
    live = model.state_dict()
    # of an output head that is the embedding, files have one; what comes back may be copies, so names only
    own = {name: live[name] for name in remove_tied_weights_from_state_dict(dict(live), model)}
    memory = {t.untyped_storage().data_ptr() for t in own.values()}
    found = revert_weight_conversion(model, {name: t.as_subclass(_View) for name, t in own.items()})
    for name, view in found.items():
        if view.untyped_storage().data_ptr() not in memory:
            raise UserError(f"{type(model).__name__}: transformers computes {name} from tensors of its own, "
                            "so it cannot be updated in place; load the model from a folder")
    return {name: view.as_subclass(torch.Tensor) for name, view in found.items()}


@torch.no_grad()
def copy_weights(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors into a loaded model, one after the other, in place.

    Args:
        model: as `load_hf` gives it.
        weights: all of its tensors, by their names in files; those that its class ignores in files, such as
            a multi-token prediction layer, may be among them.

    Raises:
        UserError: a tensor is missing, unknown, of another shape or comes twice; the model is then part
            old, part new.
    """
    views = live_views(model)
    for name, tensor in checked(weights, *_known(model, views)):
        views[name].copy_(tensor)


@torch.no_grad()
def copy_changed(model: Any, changed: Iterable[Changed]) -> None:
    """Write what has changed in every tensor into a loaded model; arguments and errors as of
    `copy_weights`."""
    views = live_views(model)
    for name, found in checked(((one.name, one) for one in changed), *_known(model, views)):
        view = views[name]
        view.index_put_(tuple(axis.to(view.device) for axis in found.coordinates()), found.values.to(view))


def _known(model: Any, views: Mapping[str, torch.Tensor]) -> tuple[dict[str, tuple[int, ...]], Sequence[str]]:
    """Return the shapes of a model's tensors, and what it may be given and does without."""
    return ({name: tuple(view.shape) for name, view in views.items()},
            model._keys_to_ignore_on_load_unexpected or ())
