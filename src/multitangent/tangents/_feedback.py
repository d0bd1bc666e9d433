"""Guesses of the gradient from the error at the output, by a feedback that is learned forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from multitangent.tangents._guesses import GuessSource, StatefulSource, guess_block
from multitangent.tangents._observation import Needs, Observation
from multitangent.tangents._positions import mean_square
from multitangent.tangents._request import Request


@dataclass(frozen=True)
class Feedback(GuessSource):
    """Guesses ``e B`` of the gradient: the output's error e, sent to every site by a matrix.

    The gradient of a sample's activations is ``e J``, with e the derivative of its loss by the
    model's output z and J ``[outputs, n]`` the Jacobian of the output by the activations. J differs
    from sample to sample, but samples with alike outputs have alike Jacobians. So there is one
    matrix for every output unit, mixed by what the sample's output says:

        ``B(z) = sum_c softmax(z)_c B_c``.

    The matrices are learned from the random tangents beside them. Each random tangent v of a step
    has brought its ``J v`` to the model's output, and with p = softmax(z) and m = n / lambda (where
    lambda is the tangents' largest variance at a position over their mean one)

        ``B_c <- B_c + step_size m / (m + M) sum p_c / |p|^2 (J v - B(z) v) v^T / |v|^2``,

    over the step's M random tangents, is a step of normalised least mean squares. For tangents of
    independent random entries it is stable for any M up to a step size of 1. With
    ``share="sample"`` every sample brings tangents of its own, so M = K B, and the matrices are
    known within a few steps; with ``share="batch"`` M = K. Nothing can be learned from tangents
    that samples repeat, such as those of `StandardBasis`. The softmax is over all numbers of a
    sample's output.

    Nothing is sent backwards from site to site: the error goes from the output to all sites at
    once, as in direct feedback alignment (Nokland 2016), and the weights of other layers are not
    used; that B is learned from forward derivatives is a weight mirror (Akrout et al. 2019) along
    whole networks.

    Args:
        num_tangents: K. Site i has its guess in tangent i modulo K: with one tangent all sites
            have a common length to be found, with one for every site each its own.
        step_size: Of the learning, above 0 and at most 1.
        gated: Whether there is a matrix for every output unit, ``[outputs^2, n]`` numbers, rather
            than one for all samples, ``[outputs, n]``.

    Raises:
        ValueError: If an argument is out of range; in a step, if it perturbs weights or has no
            random tangents to learn from.

    Examples:
        >>> from multitangent import Activations, ControlVariate, ForwardGradient, Normal
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> gradient = ForwardGradient(
        ...     model, torch.nn.CrossEntropyLoss(), Normal(2) + Feedback(gated=False),
        ...     ControlVariate(), Activations(share="sample", output="exact"),
        ... )
        >>> x, y = torch.randn(64, 4), torch.zeros(64, dtype=torch.int64)
        >>> values = [gradient(x, y) for _ in range(100)]
        >>> learned = gradient.state_dict()["tangents"]["1"]["matrices"]["0"]
        >>> torch.allclose(learned, model[1].weight, atol=1e-3)
        True
    """

    num_tangents: int = 1
    step_size: float = 0.5
    gated: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.step_size <= 1:
            raise ValueError(
                f"`step_size` should be above 0 and at most 1. Found {self.step_size!r}."
            )

    def init(self) -> _LearnedFeedback:
        return _LearnedFeedback(self)


class _LearnedFeedback(StatefulSource[Feedback]):
    """The matrices of one gradient, one below the other: ``[gates * outputs, n]`` by site."""

    def __init__(self, options: Feedback) -> None:
        super().__init__(options)
        self.matrices: dict[str, Tensor] = {}

    def needs(self, step: int) -> Needs:
        return Needs.OUTPUT | Needs.OUTPUT_TANGENTS | Needs.UPDATE

    def draw(self, request: Request) -> Tensor:
        error = request.output_gradient
        if error is None or request.batch is None:
            raise ValueError(
                "`Feedback` should be among the tangents of activations. Found a step that "
                "perturbs something else. Try `perturb='activations'`."
            )
        gates = self._gates(request)
        matrix = self.matrices.get(request.name)
        rows = gates.shape[1] * error[0].numel()
        if matrix is None or matrix.shape != (rows, prod(request.shape)):  # none, or another's
            guess = error.new_zeros(len(error), *request.shape, dtype=request.dtype)
        else:
            errors = (gates.unsqueeze(2) * error.reshape(len(error), 1, -1)).flatten(1)
            guess = (errors.to(matrix.dtype) @ matrix).to(request.dtype)
        return guess_block(guess.reshape(len(error), *request.shape), request, self.num_tangents)

    def _gates(self, request: Request) -> Tensor:
        """The weights of the matrices, which sum to 1: ``[b, gates]``."""
        assert request.output is not None
        output = request.output.reshape(len(request.output), -1)
        return output.softmax(1) if self.options.gated else output.new_ones(len(output), 1)

    @torch.no_grad()
    def update(self, observation: Observation) -> None:
        responses = observation.output_tangents
        random = [k for k, guess in enumerate(observation.guesses) if not guess]
        if not random or responses is None:
            raise ValueError(
                "`Feedback` should have random tangents beside it, from which it learns. Found "
                "none. Try `Normal(2) + Feedback()`."
            )
        requests = observation.requests
        shared = all(request.samples is None for request in requests.values())
        samples = slice(0, 1) if shared else slice(None)
        drawn = {
            name: rows[random][:, samples].to(requests[name].dtype)
            for name, rows in observation.tangents.items()
        }
        vectors = {name: rows.flatten(2) for name, rows in drawn.items()}  # [K, 1 or b, n]
        answers = responses[random].reshape(len(random), responses.shape[1], -1)
        answers = answers.to(next(iter(vectors.values())).dtype)
        gates = self._gates(next(iter(requests.values()))).to(answers.dtype)  # [b, gates]
        count, outputs = gates.shape[1], answers.shape[2]
        before = {name: self._matrix(name, v, count * outputs) for name, v in vectors.items()}
        predicted = [v @ before[name].mT for name, v in vectors.items()]
        of_gates = torch.stack(predicted).sum(0).reshape(len(random), -1, count, outputs)
        missed = answers - (of_gates * gates[None, :, :, None]).sum(2)
        each = gates / gates.square().sum(1, keepdim=True)
        scaled = torch.einsum("kbo,bg->kbgo", missed, each).flatten(2)
        if shared:
            scaled = scaled.mean(1, keepdim=True)
        scaled = scaled * self._steps(drawn, vectors).unsqueeze(2)
        learned = scaled.flatten(0, 1).mT
        self.matrices = self.matrices | {
            name: torch.addmm(before[name], learned, v.flatten(0, 1)) for name, v in vectors.items()
        }

    def _steps(self, drawn: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> Tensor:
        """The step's length for each random tangent, ``[K, 1 or b]``."""
        squared = torch.stack([v.square().sum(2) for v in vectors.values()]).sum(0)
        sizes = [mean_square(rows, tuple(rows.shape[2:])).max() for rows in drawn.values()]
        largest = torch.stack(sizes).max().clamp(min=1e-30)
        dimension = squared.mean().double() / largest  # the effective one
        step_size = self.options.step_size * dimension / (dimension + squared.numel())
        return squared.clamp(min=1e-30).reciprocal() * step_size

    def _matrix(self, name: str, vectors: Tensor, rows: int) -> Tensor:
        """What is known of a site, zeros where nothing is."""
        matrix = self.matrices.get(name)
        if matrix is None or matrix.shape != (rows, vectors.shape[2]):
            return vectors.new_zeros(rows, vectors.shape[2])
        return matrix

    def state_dict(self) -> dict[str, Any]:
        return {"matrices": dict(self.matrices)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.matrices = dict(state.get("matrices", {}))
