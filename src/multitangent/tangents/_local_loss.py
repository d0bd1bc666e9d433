"""Guesses of the gradient from small heads with losses of their own."""

from __future__ import annotations

import copy
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
        ValueError: If an argument is out of range; in a step, if it perturbs weights, or if the
            loss can not be taken of any numbers, as that of probabilities.

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
        always = Needs.UPDATE | Needs.PRIMAL
        return always if has_shape else always | Needs.OUTPUT

    def draw(self, request: Request) -> Tensor:
        if request.batch is None or request.primal is None:
            raise ValueError(
                "`LocalLoss` should be among the tangents of activations. Found a step that "
                "perturbs something else. Try `perturb='activations'`."
            )
        head = self._head(request)
        if head is None:  # it would predict nothing yet
            return guess_block(torch.zeros_like(request.primal), request, self.num_tangents)
        with torch.enable_grad():
            value = request.primal.detach().requires_grad_()
            losses = _losses(head(self._features(value)), request, self._output_shape)
            (guess,) = torch.autograd.grad(losses.sum(), value)
        return guess_block(guess, request, self.num_tangents)

    def update(self, observation: Observation) -> None:
        requests = observation.requests
        if self._output_shape is None:
            error = next(iter(requests.values())).output_gradient
            assert error is not None
            self._output_shape = tuple(error.shape[1:])
        gradients = {name: self._learn(request) for name, request in requests.items()}
        for name, of_head in gradients.items():  # nothing fails from here on
            for parameter, gradient in zip(self._heads[name].parameters(), of_head, strict=True):
                parameter.grad = gradient
            self._optimizers[name].step()

    def _learn(self, request: Request) -> tuple[Tensor, ...]:
        """The gradients of a head's parameters."""
        assert request.primal is not None
        features = self._features(request.primal.detach())
        head = self._head(request) or self._make_head(request, features)
        with torch.enable_grad():
            losses = _losses(head(features), request, self._output_shape)
            return torch.autograd.grad(losses.mean(), list(head.parameters()))

    def _features(self, value: Tensor) -> Tensor:
        return _features(value, self.options.pool)

    def _head(self, request: Request) -> nn.Linear | None:
        """The head of a site, if there is one that fits."""
        head = self._heads.get(request.name)
        if head is None or request.primal is None:
            return None
        fits = head.in_features == self._features(request.primal[:1]).shape[1]
        return head if fits else None  # it may be that of another layer

    def _make_head(self, request: Request, features: Tensor) -> nn.Linear:
        head = self._empty_head(request.name, features)
        for number in (-2.0, 2.0):  # what no loss of probabilities takes
            _losses(torch.full_like(head(features), number), request, self._output_shape)
        return head

    def _empty_head(self, name: str, features: Tensor) -> nn.Linear:
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
        return head

    def state_dict(self) -> dict[str, Any]:
        return {
            "output_shape": self._output_shape,
            "heads": {name: _copy(head) for name, head in self._heads.items()},
            "optimizers": {name: _copy(each) for name, each in self._optimizers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._heads, self._optimizers = {}, {}
        shape = state.get("output_shape")
        self._output_shape = None if shape is None else tuple(shape)
        for name, head in state.get("heads", {}).items():
            self._empty_head(name, head["weight"])
            self._heads[name].load_state_dict(head)
            self._optimizers[name].load_state_dict(state["optimizers"][name])


def _features(value: Tensor, pool: int) -> Tensor:
    """What a head sees of a value ``[b, *shape]``: ``[b, features]``."""
    if value.ndim == 4:
        cells = min(pool, value.shape[2]), min(pool, value.shape[3])
        return F.adaptive_avg_pool2d(value, cells).flatten(1)
    return value.mean(1) if value.ndim == 3 else value.flatten(1)


def _losses(output: Tensor, request: Request, shape: tuple[int, ...] | None) -> Tensor:
    """The losses of the output of a head, ``[b, outputs]``."""
    assert request.loss is not None
    assert shape is not None
    try:
        losses = request.loss(output.reshape(len(output), *shape), request.target)
    except (RuntimeError, ValueError, IndexError) as error:
        raise _refused(request.name, shape, f"{type(error).__name__}: {error}") from error
    # Where numbers have grown beyond all bounds, the step says so.
    if not losses.isfinite().all() and bool(output.abs().max() < 1e6):
        raise _refused(request.name, shape, "losses that are not finite")
    return losses


def _refused(name: str, shape: tuple[int, ...], reason: str) -> ValueError:
    return ValueError(
        "`LocalLoss` needs a loss that takes any numbers of the shape of the first batch's output: "
        f"a linear head predicts them. Found, for {list(shape)} a sample at {name!r}: {reason} Try "
        "a loss of logits, such as nn.BCEWithLogitsLoss in place of nn.BCELoss behind a sigmoid, "
        "and a new gradient where the output's shape has changed."
    )


def _copy(part: nn.Module | torch.optim.Optimizer) -> dict[str, Any]:
    """The state of a part, which goes on to change."""
    return copy.deepcopy(dict(part.state_dict()))
