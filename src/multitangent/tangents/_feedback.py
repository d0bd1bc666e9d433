"""Guesses of the gradient from the error at the output, by a feedback that is learned forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multitangent.tangents._informed import InformedSource, Learner, guess_block
from multitangent.tangents._source import Lesson, Request


@dataclass(frozen=True)
class Feedback(InformedSource):
    """Guesses ``e B`` of the gradient: the output's error e, sent to every site by a matrix.

    The gradient of a sample's activations is ``e J``, with e the derivative of its loss by the
    model's output and J ``[outputs, n]`` the Jacobian of the output by the activations. J differs
    from sample to sample, but not wholly: B is the running least-squares fit of one matrix to all
    of them. It is learned from the random tangents beside it. Each random tangent v of a step has
    brought its ``J v`` to the model's output, and

        ``B <- B + rate / (n + M) sum (J v - B v) v^T``, over the step's M random tangents,

    is a step of least mean squares, stable for any M up to a rate of 1.
    With ``share="sample"`` every sample brings tangents of its own, so M = K B, and B is known
    within a few steps; with ``share="batch"`` M = K.

    Nothing is sent backwards from site to site: the error goes from the output to all sites at
    once, as in direct feedback alignment (Nokland 2016), and the weights of other layers are not
    used; that B is learned from forward derivatives is a weight mirror (Akrout et al. 2019) along
    whole networks.

    Args:
        num_tangents: K. Site i has its guess in tangent i modulo K: with one tangent all sites
            have a common length to be found, with one for every site each its own.
        rate: Of the learning, above 0 and at most 1.

    Raises:
        ValueError: If an argument is out of range; in a step, if it perturbs weights or has no
            random tangents to learn from.

    Examples:
        >>> from multitangent import Activations, ControlVariate, ForwardGradient, Normal
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> gradient = ForwardGradient(
        ...     model, torch.nn.CrossEntropyLoss(), Normal(2) + Feedback(), ControlVariate(),
        ...     Activations(share="sample", output="exact"),
        ... )
        >>> x, y = torch.randn(64, 4), torch.zeros(64, dtype=torch.int64)
        >>> values = [gradient(x, y) for _ in range(100)]
        >>> learned = gradient.state_dict()["tangents"]["1"]["matrices"]["0"]
        >>> torch.allclose(learned, model[1].weight, atol=1e-3)
        True
    """

    num_tangents: int = 1
    rate: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate <= 1:
            raise ValueError(f"`rate` should be above 0 and at most 1. Found {self.rate!r}.")

    def started(self) -> _LearnedFeedback:
        return _LearnedFeedback(self)


class _LearnedFeedback(Learner[Feedback]):
    """The matrices B of one gradient, ``[outputs, n]`` by site."""

    sees_output = True

    def __init__(self, options: Feedback) -> None:
        super().__init__(options)
        self.matrices: dict[str, Tensor] = {}

    def draw(self, request: Request) -> Tensor:
        error = request.output_gradient
        if error is None or request.batch is None:
            raise ValueError(
                "`Feedback` should be among the tangents of activations. Found a step that "
                "perturbs something else. Try `perturb='activations'`."
            )
        matrix = self.matrices.get(request.name)
        if matrix is None:
            guess = error.new_zeros(len(error), *request.shape, dtype=request.dtype)
        else:
            guess = (error.flatten(1).to(matrix.dtype) @ matrix).to(request.dtype)
        return guess_block(guess.reshape(len(error), *request.shape), request, self.num_tangents)

    @torch.no_grad()
    def learn(self, lesson: Lesson) -> None:
        responses = lesson.output_tangents
        random = [k for k, guess in enumerate(lesson.informed) if not guess]
        if not random or responses is None:
            raise ValueError(
                "`Feedback` should have random tangents beside it, from which it learns. Found "
                "none. Try `Normal(2) + Feedback()`."
            )
        requests = lesson.requests
        shared = all(request.samples is None for request in requests.values())
        samples = slice(0, 1) if shared else slice(None)
        answers = responses[random].flatten(2)  # [K, b, outputs]
        if shared:
            answers = answers.mean(1, keepdim=True)
        vectors = {
            name: rows[random][:, samples].flatten(2).to(requests[name].dtype)
            for name, rows in lesson.tangents.items()
        }
        predicted = [v @ self._matrix(n, v, answers).mT for n, v in vectors.items()]
        missed = answers.to(predicted[0].dtype) - torch.stack(predicted).sum(0)
        squared = sum(v.square().sum(-1) for v in vectors.values())  # [K, b]
        assert isinstance(squared, Tensor)
        dimension = sum(v.shape[-1] for v in vectors.values())
        step = self.options.rate / (dimension + squared.numel())
        scaled = missed * (step * dimension / squared.clamp(min=1e-30)).unsqueeze(-1)
        for name, v in vectors.items():
            self.matrices[name] += scaled.flatten(0, 1).mT @ v.flatten(0, 1)

    def _matrix(self, name: str, vectors: Tensor, answers: Tensor) -> Tensor:
        if name not in self.matrices:
            self.matrices[name] = vectors.new_zeros(answers.shape[-1], vectors.shape[-1])
        return self.matrices[name]

    def state_dict(self) -> dict[str, Any]:
        return {"matrices": dict(self.matrices)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.matrices = {name: m.clone() for name, m in state.get("matrices", {}).items()}
