"""Activity perturbation: the tangents are directions in the space of the layers' outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from multitangent.objective import Batch, Objective
from multitangent.perturbation._activation_run import ActivationRun
from multitangent.perturbation._ending import Ending
from multitangent.perturbation._perturbation import BoundPerturbation
from multitangent.perturbation._sites import Site, find_sites
from multitangent.tangents import Stream, Tangents

_CHOICES = {
    "share": ("batch", "sample"),
    "output": ("perturbed", "exact"),
    "credit": ("sample", "token"),
}


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
        credit: ``"sample"`` measures the loss of every sample. ``"token"`` is for models that are
            causal in time. It measures the loss of every token, ``[K, B, T]``, and credits a
            position with the losses from its own token on. The output of every site must be
            ``[B, T, ...]``. A loss module must give ``[B, T]`` without its reduction. A function
            must return ``[B, T]``, and the loss of a sample is the mean over T.
        discount: With ``credit="token"``, a number from 0 to 1. A loss counts ``discount^t`` for a
            position t steps before it. Below 1 the gradient has a bias and less noise.

    Raises:
        ValueError: If an option is unknown or out of range; when bound to a model, if a site is
            unknown or sites lie inside one another.

    Examples:
        >>> Activations(share="sample").output
        'perturbed'

        Six tangents span all T n = 6 activations, so this gradient is exact:

        >>> import torch
        >>> from multitangent import ForwardGradient, Normal
        >>> model = nn.GRU(4, 2, batch_first=True)
        >>> loss = lambda output, y: (output[0] - y).square().sum(2)  # [B, T]
        >>> gradient = ForwardGradient(
        ...     model, loss, Normal(6), perturb=Activations(credit="token")
        ... )
        >>> x, y = torch.randn(8, 3, 4), torch.randn(8, 3, 2)
        >>> round(gradient.assess(x, y).cosine, 3)
        1.0
    """

    sites: Sequence[str] | None = None
    share: Literal["batch", "sample"] = "batch"
    output: Literal["perturbed", "exact"] = "perturbed"
    recompute: bool = False
    credit: Literal["sample", "token"] = "sample"
    discount: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"`{name}` should be one of {choices}. Found {value!r}.")
        if not (isinstance(self.discount, int | float) and 0 <= self.discount <= 1):
            raise ValueError(
                f"`discount` should be at least 0 and at most 1. Found {self.discount!r}."
            )
        if self.credit == "sample" and self.discount != 1:
            raise ValueError(
                "`discount` should be 1 for credit='sample', which has no time axis. Found "
                f"{self.discount!r}. Try `Activations(credit='token', discount={self.discount!r})`."
            )

    @property
    def has_tokens(self) -> bool:
        """Whether the losses of tokens are measured."""
        return self.credit == "token"

    def bind(self, objective: Objective) -> BoundPerturbation:
        if objective.has_tokens != self.has_tokens:
            raise ValueError(
                f"`objective` should be one with has_tokens={self.has_tokens} for "
                f"`Activations(credit={self.credit!r})`. Found has_tokens={objective.has_tokens}. "
                f"Try `Objective(model, loss, has_tokens={self.has_tokens})`."
            )
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
            discount=self.options.discount if self.options.has_tokens else None,
        )
