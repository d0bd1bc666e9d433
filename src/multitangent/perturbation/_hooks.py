"""Who is told when a run of a model reaches a site and leaves it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from multitangent._structures import hidden_tensors, map_tensors
from multitangent.perturbation._sites import Site


class Visitor(ABC):
    """Who is told when a run of the model reaches and leaves a site."""

    def __init__(self) -> None:
        self._active: Site | None = None
        self._remaining = 0
        self._counts: dict[str, int] = {}

    def enter(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the first module of a site runs; may return other ``(args, kwargs)``."""
        if site is not self._active:
            self._active = site
            self._remaining = site.modules.count(site.modules[-1])

    def _ends(self, site: Site) -> bool:
        """Whether a run of a site's last module ends the site: it may stand in several places."""
        if site is not self._active:
            return False
        self._remaining -= 1
        if self._remaining == 0:
            self._active = None
        return self._remaining == 0

    def _replaced(
        self,
        site: Site,
        output: Any,
        replace: Callable[[Tensor, str], Tensor],
        replace_others: Callable[[Tensor, str], Tensor] | None = None,
    ) -> Any:
        """A site's output, each of its tensors replaced; the tensors are named by site and run.

        Args:
            site: The site.
            output: What it returned.
            replace: Makes what takes a tensor's place.
            replace_others: The same for all but the first tensor of the output.
        """
        replacements = chain([replace], repeat(replace_others or replace))

        def named(value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value
            count = self._counts.get(site.name, 0)
            self._counts[site.name] = count + 1
            name = site.name if count == 0 else f"{site.name}#{count}"
            return next(replacements)(value, name)

        with torch._C.DisableTorchFunction():  # nothing here concerns the model's functions
            if isinstance(output, Tensor):
                return named(output)
            _refuse_hidden(site, output)
            return map_tensors(named, output)

    @abstractmethod
    def leave(self, site: Site, output: Any) -> Any:
        """After the last module of a site ran; returns what goes on through the model."""


def _refuse_hidden(site: Site, output: Any) -> None:
    for kind, tensor in hidden_tensors(output):
        if tensor.is_floating_point():
            raise ValueError(
                "`sites` should return tensors, or tuples, lists, mappings or dataclasses of them. "
                f"Found a tensor inside {kind} at {site.name!r}, where it would not be perturbed. "
                "Try one of those in its place, `Activations(sites=[...])` with a module around "
                "it that returns tensors, or `perturb='weights'`."
            )


@contextmanager
def observed(sites: Sequence[Site], visitor: Visitor) -> Iterator[None]:
    """Call `visitor` at every site, for the duration of a ``with`` block.

    A site that runs while the model has switched gradients off is none: no gradient leads there.
    """
    level = torch._C._functorch.maybe_current_level()

    def enter(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._functorch.maybe_current_level() != level:
            raise NotImplementedError(
                "`sites` should run outside of torch.func, whose transforms do not know tangents. "
                f"Found {site.name!r} inside of one. Try a formula in its place."
            )
        return visitor.enter(site, args, kwargs) if torch.is_grad_enabled() else None

    def leave(site: Site, output: Any) -> Any:
        return visitor.leave(site, output) if torch.is_grad_enabled() else output

    handles = []
    try:
        for site in sites:
            handles.append(
                site.modules[0].register_forward_pre_hook(
                    lambda module, args, kwargs, site=site: enter(site, args, kwargs),
                    prepend=True,  # the hooks of a user belong to the site
                    with_kwargs=True,
                )
            )
            handles.append(
                site.modules[-1].register_forward_hook(
                    lambda module, args, output, site=site: leave(site, output)
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


class Injector(Visitor):
    """Does something to every output of every site.

    Args:
        inject: From a value and its name to what takes its place.
    """

    def __init__(self, inject: Callable[[Tensor, str], Tensor]) -> None:
        super().__init__()
        self._inject = inject

    def leave(self, site: Site, output: Any) -> Any:
        return self._replaced(site, output, self._inject) if self._ends(site) else output
