"""The modules of a model that a checkpoint names, and empty ones in their places, for its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from slablm.checkpoint.entries import ModuleSpec
from slablm.checkpoint.files import WAY_OUT
from slablm.checkpoint.verification import Checkpoint
from slablm.errors import SlabError
from slablm.packing import Spec
from slablm.runtime.experts import Experts, shares_of
from slablm.runtime.int8 import use_int8
from slablm.runtime.linear import SlabLinear
from slablm.runtime.replace_module import replace_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def place_layers(
    model: PreTrainedModel, modules: Mapping[str, ModuleSpec], specs: Mapping[str, Spec]
) -> dict[str, ModuleSpec]:
    """Put empty `SlabLinear` layers where the checkpoint has packed ones; the modules by the model's own names.

    Args:
        model: on the meta device.
        modules: what config.json says about each compressed layer.
        specs: what the files hold of them.

    Raises:
        SlabError: the model has none of this name, or one of another shape.
    """
    own = {}
    for name, module in modules.items():
        own_name, linear = _find_linear(model, name)
        spec = specs[name]
        _check_shape(model, name, (spec.out_features, spec.in_features), linear)
        own[own_name] = module
        replace_module(model, own_name, SlabLinear.from_spec(spec, linear.bias))
    return own


def _find_linear(model: PreTrainedModel, name: str) -> tuple[str, nn.Linear]:
    """The layer that a checkpoint calls `name`, and this model's own name of it.

    A model without a head (``LlamaModel``) has ``layers.0`` where the one with a head has ``model.layers.0``; each can
    be loaded from a checkpoint of the other.

    Raises:
        SlabError: there is none.
    """
    found = _find(model, name, nn.Linear)
    if found is None:
        raise SlabError(f"config.json lists a compressed layer {name!r} that {type(model).__name__} lacks")
    own_name, linear = found
    assert isinstance(linear, nn.Linear)
    return own_name, linear


def _find(model: PreTrainedModel, name: str, *kinds: type[nn.Module]) -> tuple[str, nn.Module] | None:
    """This model's own name of a module of a checkpoint, and the module; None if there is none of these classes."""
    prefix = f"{model.base_model_prefix}."
    for own_name in (name, name.removeprefix(prefix), prefix + name):
        try:
            module = model.get_submodule(own_name)
        except AttributeError:
            continue
        if isinstance(module, kinds):
            return own_name, module
    return None


def place_experts(model: PreTrainedModel, names: Sequence[str]) -> tuple[str, ...]:
    """Take the experts of these modules apart, as the checkpoint has them; the model's own names of the modules.

    Raises:
        SlabError: the model has no such experts.
    """
    own_names = []
    for name in names:
        found = _find(model, name, nn.Module)
        if found is None or not shares_of(found[1]):
            raise SlabError(f"config.json lists experts {name!r} that {type(model).__name__} lacks")
        replace_module(model, found[0], Experts.of(found[1]))
        own_names.append(found[0])
    return tuple(own_names)


def place_int8_rows(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Put empty int8 rows where the checkpoint has some, and where this model ties another module to them.

    Raises:
        SlabError: the model has none of them, or one of another shape.
    """
    pieces, names, stored = checkpoint.pieces, [], set()
    for name, holder in checkpoint.int8_rows.items():
        found = _find(model, name, nn.Embedding, nn.Linear)
        if found is not None:  # a model need not have a head
            names.append(found[0])
            stored |= {found[0]} if name == holder else set()
            _check_shape(model, name, pieces[f"{holder}.weight"].shape, found[1])
    if checkpoint.int8_rows and not names:
        raise SlabError(
            f"config.json lists int8 rows {next(iter(checkpoint.int8_rows))!r} that {type(model).__name__} lacks"
        )
    for pair in model.all_tied_weights_keys.items():
        modules = [tensor.removesuffix(".weight") for tensor in pair]
        if not set(names).isdisjoint(modules):
            names += [module for module in modules if module not in names]
    use_int8(model, names)
    for name in set(names) - stored:  # transformers would look for them in the files
        model.get_submodule(name)._buffers["scales"] = None


def _check_shape(model: PreTrainedModel, name: str, shape: tuple[int, ...], module: nn.Module) -> None:
    own = module.weight.shape
    assert isinstance(own, torch.Size)
    if own != shape:
        raise SlabError(
            f"layer {name!r} is {' × '.join(map(str, shape))} in the files and "
            f"{' × '.join(map(str, own))} in {type(model).__name__}: {WAY_OUT}"
        )
