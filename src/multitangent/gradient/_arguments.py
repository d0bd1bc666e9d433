"""Checks of what users hand to a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from multitangent.aggregation import Aggregator
from multitangent.objective import Objective
from multitangent.perturbation import Activations, Perturbation, Weights
from multitangent.tangents import TangentSource


def check_kinds(tangents: object, aggregator: object) -> None:
    """Raise where a tangent source or an aggregator is something else."""
    kinds: list[tuple[str, object, type, str]] = [
        ("tangents", tangents, TangentSource, "Normal(16)"),
        ("aggregator", aggregator, Aggregator, "Projection()"),
    ]
    for name, value, kind, example in kinds:
        if value is not None and not isinstance(value, kind):
            raise TypeError(
                f"`{name}` should be of type {kind.__name__}. Found {value!r}. Try {example}."
            )


def check_as_they_are(tangents: TangentSource, aggregator: Aggregator, *, has_tokens: bool) -> None:
    """Raise where guesses would be taken as they are, and can not be."""
    of_other_steps = aggregator.of_step(learns=False)
    if of_other_steps.needs_derivatives:
        return
    if has_tokens:
        raise ValueError(
            "`aggregator` should measure for `Activations(credit='token')`: what a guess holds "
            f"differs from token to token. Found {aggregator!r}, which takes guesses as they are. "
            "Try `ControlVariate()`, `Projection()`, or `credit='sample'`."
        )
    for part in tangents.parts:
        if all(part.guesses) and not part.has_length:
            raise ValueError(
                f"`tangents` should have guesses as long as the gradient for {aggregator!r}, which "
                f"takes them as they are. Found {part!r}, which is a direction only. Try "
                "`Homogeneous(Feedback())`, or `ControlVariate()`."
            )


def check_options(
    model: object,
    loss: object,
    seed: object,
    micro_batch: object,
    store_tangents: object,
    tangent_dtype: object,
    compile: object,
) -> None:
    """Raise where an argument is of another kind than it should be."""
    carries = isinstance(tangent_dtype, torch.dtype) and tangent_dtype.is_floating_point
    fitting = [
        ("model", model, isinstance(model, nn.Module), "a torch.nn.Module"),
        ("loss", loss, callable(loss) and not isinstance(loss, type), "a function or loss module"),
        ("seed", seed, type(seed) is int, "an integer"),
        ("store_tangents", store_tangents, type(store_tangents) is bool, "True or False"),
        (
            "tangent_dtype",
            tangent_dtype,
            tangent_dtype is None or carries,
            "a floating torch.dtype",
        ),
        ("compile", compile, type(compile) is bool, "True or False"),
    ]
    for name, value, fits, wanted in fitting:
        if not fits:
            raise TypeError(f"`{name}` should be {wanted}. Found {value!r}.")
    wrapped = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, nn.Module) and any(isinstance(m, wrapped) for m in model.modules()):
        raise TypeError(
            "`model` should be the module itself: no backward pass calls the hooks by which "
            "DataParallel and DistributedDataParallel add up gradients. Found a wrapped one. Try "
            "`model.module`, with a `mesh` whose axis is 'data'."
        )
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        trained = any(p.requires_grad for p in module.parameters())
        if trained and isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                "`model` should have its trainable parameters in modules of Python. Found "
                f"{type(module).__name__} {name!r}, which TorchScript keeps to itself. Try the "
                "module before `torch.jit.script` or `torch.jit.trace`."
            )
    if type(model).__name__ == "OptimizedModule":  # its home takes a second to import
        raise TypeError(
            "`model` should be a plain module, whose functions can be followed one by one. Found "
            "one that torch.compile made. Try the module itself, with `compile=True` here."
        )
    fits = micro_batch == "auto" or (isinstance(micro_batch, int) and micro_batch >= 1)
    if not fits:
        raise ValueError(
            f"`micro_batch` should be 'auto' or an integer of at least 1. Found {micro_batch!r}."
        )


def check_mesh(mesh: object, *, compile: bool) -> None:
    """Raise where `mesh` is none, or does not go with other arguments."""
    if mesh is None:
        return
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"`mesh` should be a DeviceMesh of torch.distributed. Found {mesh!r}. Try "
            "`init_device_mesh('cpu', (2,), mesh_dim_names=('tangent',))`."
        )
    if compile:
        raise ValueError(
            "`compile` should be False with a mesh: what the processes send is not compiled. Found "
            "True. Try it without."
        )


def check_verify(verify: object) -> None:
    """Raise where `verify` is none of what it can be."""
    if verify not in ("first", "always", "parts", False):
        raise ValueError(
            f"`verify` should be 'first', 'always', 'parts' or False. Found {verify!r}."
        )


def check_repeats(repeats: object) -> None:
    """Raise unless the number of estimates is an integer of at least 1."""
    if type(repeats) is not int or repeats < 1:
        raise ValueError(
            f"`repeats` should be an integer of at least 1. Found {repeats!r}. Try repeats=16."
        )


def check_generator(generator: object) -> None:
    """Raise where `generator` is none of what it can be."""
    if generator not in ("torch", "philox"):
        raise ValueError(f"`generator` should be 'torch' or 'philox'. Found {generator!r}.")


def check_state(state: Mapping[str, Any], tangents: TangentSource, generator: str) -> None:
    """Raise if a saved state belongs to other tangents."""
    if (saved := state.get("generator", "torch")) != generator:
        raise ValueError(
            f"`state` should belong to a gradient with generator={generator!r}. Found {saved!r}. "
            f"Try ForwardGradient with generator={saved!r}."
        )
    source = state.get("source", repr(tangents))  # older states do not say
    if source != repr(tangents):
        raise ValueError(
            f"`state` should belong to a gradient with the tangents {tangents!r}. Found {source}. "
            "Try ForwardGradient with those."
        )


def perturbation_of(perturb: Literal["activations", "weights"] | Perturbation) -> Perturbation:
    """The perturbation that a user means."""
    if perturb == "activations":
        return Activations()
    if perturb == "weights":
        return Weights()
    if callable(getattr(perturb, "bind", None)) and not isinstance(perturb, type):
        return perturb
    raise ValueError(
        "`perturb` should be 'activations', 'weights', or a perturbation such as Activations() or "
        f"Weights(). Found {perturb!r}."
    )


def objective_of(
    model: nn.Module, loss: Callable[[Any, Any], Tensor], perturb: Perturbation
) -> Objective:
    """The model and its loss, with the losses that a perturbation measures."""
    of_batch = isinstance(perturb, Weights)  # derivatives are those of the batch's loss
    of_tokens = bool(getattr(perturb, "has_tokens", False))
    return Objective(model, loss, takes_scalar=of_batch, has_tokens=of_tokens)


def refuse_inference_mode() -> None:
    """Raise inside ``torch.inference_mode()``."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "A gradient should be taken outside torch.inference_mode(), whose tensors can not be "
            "recorded for the local step. Found it enabled. Try torch.no_grad() in its place."
        )


def refuse_backward_hooks(modules: Sequence[nn.Module], root: nn.Module) -> None:
    """Raise if a module has hooks on the gradients of its inputs or outputs.

    Args:
        modules: The modules.
        root: The one that holds them, for their names.
    """
    everywhere = torch.nn.modules.module
    if everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks:
        raise _backward_hook("all modules")
    for module in modules:
        if module._backward_hooks or module._backward_pre_hooks:
            name = next(name for name, other in root.named_modules() if other is module)
            raise _backward_hook(f"{name or 'the whole'!r} ({type(module).__name__})")


def _backward_hook(place: str) -> ValueError:
    return ValueError(
        "`model` should have no hooks on the gradients of its layers: there are no such gradients "
        f"without a backward pass, and a hook may change them. Found a backward hook of {place}. "
        "Try to remove it; or a hook of a parameter, or a torch.autograd.Function, whose backward "
        "is obeyed."
    )
