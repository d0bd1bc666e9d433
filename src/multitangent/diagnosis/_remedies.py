"""Safe remedies, which change how a model computes but not what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm

from multitangent._structures import tensors_of

_FOLLOWED = ("sdpa", "eager")  # implementations of attention made of functions that have rules
_TOLERANCE = 1e-3  # relative, of two implementations of one function in single precision


def repair(model: nn.Module, inference: Callable[[], Any] | None = None) -> tuple[str, ...]:
    """Apply the safe remedies to a model, in place.

    - *Attention.* A model of `transformers` whose attention is a fused kernel, such as
      ``flex_attention`` or ``flash_attention_2``, changes to ``sdpa``, or else to ``eager``.
    - *Weight normalisation.* The hook of the deprecated ``torch.nn.utils.weight_norm`` becomes
      ``torch.nn.utils.parametrizations.weight_norm``. The hook leaves a tensor with a graph in the
      module. Nobody can then copy the model after a run, which `verify` may need to do. The
      parameters stay the same objects under other names, so that optimisers still find them. The
      new form loads the ``state_dict`` of the old one.

    Nothing else needs a repair. The library itself handles recurrent layers, fused or packed, and
    the fast path of ``nn.TransformerEncoder``.

    Args:
        model: The model.
        inference: Returns the model's output. If it is given, `repair` takes back a change of
            attention that changes the output by more than rounding.

    Returns:
        What was done, with the names of the modules.

    Examples:
        >>> import warnings
        >>> from multitangent.diagnosis import repair
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     model = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)))
        >>> gains = model[0].weight_g
        >>> repair(model)
        ("0: torch.nn.utils.weight_norm of 'weight' became parametrizations.weight_norm",)
        >>> model[0].parametrizations.weight.original0 is gains
        True
    """
    return (*_repaired_attention(model, inference), *_repaired_weight_norms(model))


def attention_to_repair(module: nn.Module) -> str | None:
    """The name of the fused attention that a module uses and can replace, if there is one."""
    found = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if not isinstance(found, str) or found in _FOLLOWED:
        return None
    return found if hasattr(module, "set_attn_implementation") else None


def _repaired_attention(model: nn.Module, inference: Callable[[], Any] | None) -> Iterator[str]:
    for name, module in model.named_modules():
        found = attention_to_repair(module)
        if found is None:
            continue
        change: Any = module.set_attn_implementation
        before = inference() if inference is not None else None
        for other in _FOLLOWED:
            try:
                change(other)
            except (ValueError, ImportError):  # of a model that has no such implementation
                continue
            if inference is None or _agree(before, inference()):
                yield f"{name or '(model)'}: attention by {found!r} became {other!r}"
                break
            change(found)


def _agree(before: Any, after: Any) -> bool:
    """Whether two outputs differ by rounding only."""
    pairs = list(zip(tensors_of(before), tensors_of(after), strict=True))
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)
        for a, b in pairs
    )


def _repaired_weight_norms(model: nn.Module) -> Iterator[str]:
    for path, module in list(model.named_modules()):
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, WeightNorm):
                del module._forward_pre_hooks[key]
                _parametrize(module, hook)
                yield (
                    f"{path or '(model)'}: torch.nn.utils.weight_norm of {hook.name!r} became "
                    "parametrizations.weight_norm"
                )


def _parametrize(module: nn.Module, hook: WeightNorm) -> None:
    """Turn the parameters of the hook into those of a parametrization."""
    name = hook.name
    gain, direction = (getattr(module, f"{name}_{end}") for end in "gv")
    delattr(module, name)
    del module._parameters[f"{name}_g"], module._parameters[f"{name}_v"]
    module.register_parameter(name, nn.Parameter(direction.detach().clone()))
    parametrizations.weight_norm(module, name, hook.dim)
    originals: Any = module.parametrizations
    originals[name].original0, originals[name].original1 = gain, direction
