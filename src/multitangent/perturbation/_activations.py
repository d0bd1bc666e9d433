"""Activity perturbation: the tangents are directions in the space of the layers' outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from multitangent.objective import Batch, Objective
from multitangent.perturbation._activation_run import ActivationRun, Ending
from multitangent.perturbation._perturbation import BoundPerturbation
from multitangent.perturbation._sites import Site, find_sites
from multitangent.tangents import Stream, Tangents


@dataclass(frozen=True)
class Activations:
    """Perturb the outputs of layers; n is their total size for one sample.

    The directional derivatives are those of each sample's loss, ``[K, B]``. They give a gradient
    of each sample's activations, from which the gradients of a layer's own parameters follow
    inside that layer (Section IV). Parameters outside of all sites, such as a class token, get
    theirs from the next layer that uses them, or from the loss. An output whose first axis is not
    the batch is not perturbed: it belongs to the next layer.

    Args:
        sites: The names of the modules whose outputs are perturbed. By default, for an
            ``nn.Sequential`` each child with trainable parameters together with the parameter-free
            ones after it; for another model the blocks that it repeats in an ``nn.ModuleList`` or
            ``nn.Sequential``, as transformers do; otherwise every leaf module with trainable
            parameters (and ``nn.MultiheadAttention`` as a whole). What comes before the first block
            belongs to it, and what comes after the last one to the loss.
        share: ``"batch"`` gives all samples the same tangents, as the paper does and at the least
            cost, ``"sample"`` each its own.
        output: ``"perturbed"`` perturbs the model's output as any other site, ``"exact"`` takes
            the loss's own derivative there. Where the model goes on behind its last site, such as
            a transformer behind its last block, that site is not perturbed: it and what follows
            belong to the loss. With ``recompute`` the last site must end in the model's output.
        recompute: Run a layer again for its local step, instead of keeping its local graph.

    Raises:
        ValueError: If an option is unknown; when bound to a model, if a site is unknown or sites
            lie inside one another.

    Examples:
        >>> Activations(share="sample")
        Activations(sites=None, share='sample', output='perturbed', recompute=False)
    """

    sites: Sequence[str] | None = None
    share: Literal["batch", "sample"] = "batch"
    output: Literal["perturbed", "exact"] = "perturbed"
    recompute: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("share", ("batch", "sample")), ("output", ("perturbed", "exact"))):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"`{name}` should be one of {choices}. Found {value!r}.")

    def bind(self, objective: Objective) -> BoundPerturbation:
        return _BoundActivations(objective, self, find_sites(objective.model, self.sites))


@dataclass(frozen=True)
class _BoundActivations:
    objective: Objective
    options: Activations
    sites: Sequence[Site]
    ending: Ending = field(default_factory=Ending)

    def parameters_by_site(self) -> dict[str, list[nn.Parameter]]:
        return {site.name: site.parameters() for site in self.sites}

    def __call__(self, batch: Batch, stream: Stream, tangents: Tangents) -> ActivationRun:
        return ActivationRun(
            self.objective,
            batch,
            stream,
            tangents,
            sites=self.sites,
            own_tangents=self.options.share == "sample",
            ending=self.ending if self.options.output == "exact" else None,
            recompute=self.options.recompute,
        )
