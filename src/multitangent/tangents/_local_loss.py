"""Guesses of the gradient from small heads with losses of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multitangent.tangents._guesses import GuessSource, StatefulSource, guess_block
from multitangent.tangents._observation import Needs, Observation
from multitangent.tangents._request import Request


@dataclass(frozen=True)
class LocalLoss(GuessSource):
    """Guesses from local losses: every site has a linear head that predicts the model's output.

    The guess is the gradient of the head's loss, the user's own, by the site's value, sample by
    sample. The heads are trained beside the model by Adam, each on its own loss: nothing is sent
    from one site to another. Feature maps ``[C, H, W]`` are pooled to ``pool x pool`` cells for
    the head, tokens ``[T, D]`` to their mean.

    Args:
        num_tangents: K. Site i has its guess in tangent i modulo K.
        learning_rate: Adam's, for the heads.
        pool: Cells along each axis that a head sees of a feature map.

    Raises:
        ValueError: If an argument is out of range; in a step, if it perturbs weights.

    Examples:
        >>> from multitangent import ForwardGradient, Normal
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> gradient = ForwardGradient(model, nn.CrossEntropyLoss(), Normal(2) + LocalLoss())
        >>> value = gradient(torch.ones(8, 4), torch.zeros(8, dtype=torch.int64))
        >>> gradient.diagnostics.jvps.shape
        torch.Size([3, 8])
    """

    num_tangents: int = 1
    learning_rate: float = 0.01
    pool: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` should be above 0. Found {self.learning_rate!r}.")
        if self.pool < 1:
            raise ValueError(f"`pool` should be at least 1. Found {self.pool!r}.")

    def init(self) -> _LocalHeads:
        return _LocalHeads(self)


class _LocalHeads(StatefulSource[LocalLoss]):
    """The heads of one gradient, by site."""

    def __init__(self, options: LocalLoss) -> None:
        super().__init__(options)
        self._heads: dict[str, nn.Linear] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._output_shape: tuple[int, ...] | None = None

    def needs(self, step: int) -> Needs:
        has_shape = self._output_shape is not None  # as it is from the first step on
        return Needs.UPDATE if has_shape else Needs.UPDATE | Needs.OUTPUT

    def draw(self, request: Request) -> Tensor:
        if request.batch is None or request.primal is None:
            raise ValueError(
                "`LocalLoss` should be among the tangents of activations. Found a step that "
                "perturbs something else. Try `perturb='activations'`."
            )
        with torch.enable_grad():
            value = request.primal.detach().requires_grad_()
            (guess,) = torch.autograd.grad(self._losses(value, request).sum(), value)
        return guess_block(guess, request, self.num_tangents)

    def update(self, observation: Observation) -> None:
        for name, request in observation.requests.items():
            assert request.primal is not None
            with torch.enable_grad():
                loss = self._losses(request.primal.detach(), request).mean()
            parameters = list(self._heads[name].parameters())
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(loss, parameters), strict=True
            ):
                parameter.grad = gradient
            self._optimizers[name].step()

    def _losses(self, value: Tensor, request: Request) -> Tensor:
        if self._output_shape is None:
            assert request.output_gradient is not None
            self._output_shape = tuple(request.output_gradient.shape[1:])
        features = _features(value, self.options.pool)
        if request.name not in self._heads:
            self._make_head(request.name, features)
        output = self._heads[request.name](features).reshape(len(value), *self._output_shape)
        assert request.loss is not None
        losses: Tensor = request.loss(output, request.target)
        return losses

    def _make_head(self, name: str, features: Tensor) -> None:
        assert self._output_shape is not None
        outputs = torch.Size(self._output_shape).numel()
        head: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, features.shape[1], outputs, device=features.device, dtype=features.dtype
        )  # no random numbers are drawn,
        with torch.no_grad():  # and nothing is predicted yet
            head.weight.zero_()
            head.bias.zero_()
        self._heads[name] = head
        self._optimizers[name] = torch.optim.Adam(head.parameters(), self.options.learning_rate)

    def state_dict(self) -> dict[str, Any]:
        return {
            "output_shape": self._output_shape,
            "heads": {name: head.state_dict() for name, head in self._heads.items()},
            "optimizers": {name: each.state_dict() for name, each in self._optimizers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._heads, self._optimizers = {}, {}
        shape = state.get("output_shape")
        self._output_shape = None if shape is None else tuple(shape)
        for name, head in state.get("heads", {}).items():
            self._make_head(name, head["weight"])
            self._heads[name].load_state_dict(head)
            self._optimizers[name].load_state_dict(state["optimizers"][name])


def _features(value: Tensor, pool: int) -> Tensor:
    """What a head sees of a value ``[b, *shape]``: ``[b, features]``."""
    if value.ndim == 4:
        cells = min(pool, value.shape[2]), min(pool, value.shape[3])
        return F.adaptive_avg_pool2d(value, cells).flatten(1)
    return value.mean(1) if value.ndim == 3 else value.flatten(1)
