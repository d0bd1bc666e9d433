"""The comparison of one way to run a few samples with backpropagation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from multitangent.dual import Factored, WrongTransposeError
from multitangent.engine import (
    Backpropagation,
    Derivatives,
    SplitError,
    Trial,
    applied,
    tolerance,
)
from multitangent.gradient._causality import check_causality, token_weights
from multitangent.gradient._step import Problem
from multitangent.gradient._verification_error import VerificationError
from multitangent.objective import Batch, Objective, SavedState, kept_parameters
from multitangent.perturbation import Run, discount_of, leaves, without_hooks
from multitangent.tangents import LowRank, Needs, Normal, Request, Stream, Tangents, TangentSource

_NEARLY_ZERO = 1e-3  # of the loss: derivatives that are smaller may be nothing but rounding


class NoReferenceError(Exception):
    """Backpropagation fails where the forward gradient does not."""


class _AtSites(TangentSource):
    """One random tangent, that of one site alone or of all; in factors where a source has some."""

    num_tangents = 1

    def __init__(self, source: TangentSource, site: str | None = None) -> None:
        self.source = source
        self.site = site

    def needs(self, step: int) -> Needs:
        return self.source.needs(step) & Needs.LAST_GRADIENT

    def draw(self, request: Request) -> Tensor:
        rows = Normal(1).draw(request)
        return rows if self._is_pushed(request) else torch.zeros_like(rows)

    def has_factors(self, request: Request) -> bool:
        return self._is_pushed(request) and self.source.has_factors(request)

    def draw_factors(self, request: Request) -> Factored:
        return LowRank(1).draw_factors(request)

    def _is_pushed(self, request: Request) -> bool:
        return self.site in (None, request.name)


@dataclass(frozen=True)
class _Reference:
    """What backpropagation gives.

    Attributes:
        losses: Of the samples, ``[B]``, or of their tokens, ``[B, T]``.
        stated: The loss that the loss module itself states, if it does.
        of_values: The gradients of the perturbed values by name: ``[B, *shape]`` of the samples'
            losses, or of the batch's loss.
        of_model: The gradients of the batch's loss by the model's parameters.
        of_others: Those by other leaves. A leaf that the model made by itself is gone with the run.
    """

    losses: Tensor
    stated: Tensor | None
    of_values: Mapping[str, Tensor]
    of_model: Mapping[Any, Tensor]
    of_others: Sequence[tuple[ref[Tensor], Tensor]]

    @property
    def of_parameters(self) -> Mapping[Any, Tensor]:
        """The gradients by all that can be trained."""
        alive = {leaf(): gradient for leaf, gradient in self.of_others}
        return {**self.of_model, **{p: g for p, g in alive.items() if p is not None}}


@dataclass
class Comparison:
    """The comparison of one way to run a few samples."""

    problem: Problem
    objective: Objective
    few: Batch
    stream: Stream

    def __post_init__(self) -> None:
        self.parameters = list(dict(self.objective.model.named_parameters()))

    def check(self, trial: Trial) -> None:
        """Raise `SplitError` if losses differ, `VerificationError` if anything else does."""
        before = self.objective.saved_state()
        with kept_parameters(self.objective.model) as written:
            first = self._forward()
        if not written:
            self._check_against(trial, before, *first)
            return
        before.restore()
        with kept_parameters(self.objective.model):
            # It chooses parameters at its first batch, and is compared at its second.
            self._reference(self._start()[0], ())
            self._check_against(trial, self.objective.saved_state(), *self._forward())

    def _check_against(
        self, trial: Trial, before: SavedState, run: Run, tangents: Tangents, found: Derivatives
    ) -> None:
        self.objective.release()
        self._check_parts()
        after = self.objective.saved_state()
        before.restore()
        try:
            losses = self._plain()
            plain = self.objective.saved_state()
            before.restore()
            again, _ = self._start()
            true = self._reference(again, tangents.blocks)
        except WrongTransposeError as error:
            raise VerificationError(str(error)) from error
        except Exception as error:
            raise NoReferenceError from error
        before.restore()
        self._check_losses(losses, _of_samples(true.losses), true.stated)
        self._check_losses(found.losses, true.losses)
        if names := plain.differing(after, tolerance(true.losses)):
            raise SplitError(f"a step changes {', '.join(names)} other than a run of the model")
        is_frozen = trial.normalizes and self.problem.engine.statistics == "frozen"
        gradients = true.of_values
        if is_frozen:
            prepare = not again.per_sample  # otherwise it has the statistics of the reference
            gradients = Backpropagation().gradients(again, tangents, prepare=prepare)[1]
        if discount_of(again) is not None:
            gradients = self._gradients_in_time(again, tangents, before, found, is_frozen)
        before.restore()
        self._check_jvps(tangents, found, gradients)
        _check_last_gradient(tangents, true)
        before.restore()
        check_parameters(self.objective, run.pullback(true.of_values), true)

    def _gradients_in_time(
        self, run: Run, tangents: Tangents, before: SavedState, found: Derivatives, is_frozen: bool
    ) -> Mapping[str, Tensor]:
        """The true gradients of the weighted sum of the tokens' losses, of a causal model."""
        before.restore()
        num_tokens = found.losses.shape[1]
        check_causality(run, tangents, num_tokens)
        before.restore()
        engine = Backpropagation("frozen" if is_frozen else "coupled")
        weights = token_weights(num_tokens).unsqueeze(0)
        return next(engine.gradients_of_sums(run, tangents, weights)) if tangents.blocks else {}

    def _start(self, site: str | None = None) -> tuple[Run, Tangents]:
        problem = self.problem
        tangents = Tangents(
            _AtSites(problem.source, site), self.stream, store=problem.store_tangents
        )
        return problem.perturbation(self.few.copied(), self.stream, tangents), tangents

    def _forward(self, site: str | None = None) -> tuple[Run, Tangents, Derivatives]:
        run, tangents = self._start(site)
        return run, tangents, self.problem.engine(run, tangents)

    @torch.enable_grad()
    def _plain(self) -> Tensor:
        """The losses ``[b]`` of the model as it is, with nobody looking on at its layers."""
        few = self.few.copied()
        with self.objective.mode(few, self.stream, "update"):
            return self.objective.losses(self.objective.output(few), few).detach()

    @torch.enable_grad()
    def _reference(self, run: Run, names: Collection[str]) -> _Reference:
        """What backpropagation gives, statistics included.

        Args:
            run: Of the few samples.
            names: Of the perturbed values.
        """
        objective, few = self.objective, self.few.copied()
        values: dict[str, Tensor] = {}

        def watch(value: Tensor, name: str, samples: slice) -> Tensor:
            """The value and a zero, whose gradient is that of the value."""
            if name not in names:
                return value
            values[name] = torch.zeros_like(value, requires_grad=True)
            return value + values[name]

        if run.per_sample:
            losses, output = run.evaluate(few, watch, "update")
        else:
            with objective.mode(few, self.stream, "update"):
                output = objective.output(few)
                losses = objective.losses(output, few)
            values = {name: p for name, p in objective.model.named_parameters() if name in names}
        with objective.mode(few, self.stream, "coupled"), objective.preserved():
            stated = objective.loss.stated(output, self.few.target)
        parameters = {id(p): p for p in objective.model.parameters() if p.requires_grad}
        offsets = {id(value) for value in values.values()} if run.per_sample else set()
        others = [p for p in leaves(losses) if id(p) not in offsets | parameters.keys()]
        ends = {id(end): end for end in [*values.values(), *parameters.values(), *others]}
        with without_hooks([*parameters.values(), *others]):
            found = torch.autograd.grad(losses.sum(), list(ends.values()), allow_unused=True)
        gradients = {end: g for end, g in zip(ends, found, strict=True) if g is not None}
        scale = 1.0 if run.per_sample else run.scale
        return _Reference(
            losses.detach(),
            stated,
            {
                name: scale * gradients.get(id(value), torch.zeros_like(value)).to_dense()
                for name, value in values.items()
            },
            {p: run.scale * gradients[key] for key, p in parameters.items() if key in gradients},
            [(ref(p), run.scale * gradients[id(p)]) for p in others if id(p) in gradients],
        )

    def _check_parts(self) -> None:
        """Raise where something of the sweep is left in the model."""
        found = {name: type(p) for name, p in self.objective.model.named_parameters()}
        kept = [n for n, kind in found.items() if not issubclass(kind, torch.nn.Parameter)]
        kept += [name for name in self.parameters if name not in found]
        kept += self.objective.dual_names()
        if kept:
            raise VerificationError(
                "A step should leave a model as it is. Found tensors with tangents left in "
                f"{', '.join(kept)}. Try `.detach()` where the model keeps a tensor; otherwise it "
                "is a defect of multitangent."
            )

    def _check_losses(self, found: Tensor, losses: Tensor, stated: Tensor | None = None) -> None:
        if not losses.isfinite().all():
            return  # the step says so
        slack = tolerance(losses) * losses.abs().max()
        if found.shape != losses.shape or (found - losses).abs().max() > slack:
            raise SplitError("the losses differ from those of one run of the model")
        scale = self.objective.scale(self.few)
        if stated is not None and (stated - scale * losses.sum()).abs() > (
            slack * scale * self.few.size
        ):
            raise VerificationError(
                "`loss` should be the mean or the sum of what it gives with reduction='none'. "
                f"Found {float(scale * losses.sum()):.6g} from the samples' losses, and "
                f"{float(stated):.6g} from the module itself. Try a function that returns one loss "
                "for each sample, `(output, target) -> [B]`."
            )

    def _check_jvps(
        self, tangents: Tangents, found: Derivatives, gradients: Mapping[str, Tensor]
    ) -> None:
        per_sample = found.jvps.ndim > 1
        if not gradients or not self._differ(tangents, found, gradients, per_sample):
            return  # there are no perturbed values if nothing is before an exact output
        end, place = "the loss", ""
        for name in reversed(list(gradients)):  # from the loss to the first fault before it
            place = f"between {name!r} and {end}" if per_sample else f"for the parameter {name!r}"
            if self._differ(*self._forward(name)[1:], gradients, per_sample):
                break
            end = repr(name)
        raise VerificationError(
            "Directional derivatives should be those of backpropagation. Found others "
            f"{place}, on {self.few.size} samples of the batch. {_HINT}"
        )

    def _differ(
        self,
        tangents: Tangents,
        found: Derivatives,
        gradients: Mapping[str, Tensor],
        per_sample: bool,
    ) -> bool:
        jvps, of_samples = found.jvps, _of_samples(found.losses)
        if jvps.ndim == 3:
            jvps = jvps @ token_weights(jvps.shape[2]).to(jvps)
        expected = applied(tangents, gradients, per_sample=per_sample)
        squares = [g.double().square() for g in gradients.values()]
        length = sum(s.flatten(1).sum(1) if per_sample else s.sum() for s in squares)
        losses = of_samples if per_sample else of_samples.mean()
        size = expected.abs() + torch.as_tensor(length).sqrt() + _NEARLY_ZERO * losses.abs()
        slack = max(tolerance(found.losses), tolerance(found.jvps))
        both = expected.isfinite().all() & jvps.isfinite().all()
        return bool(((jvps - expected).abs() > slack * size).any() & both)


def _of_samples(losses: Tensor) -> Tensor:
    """The losses ``[B]`` of samples, from losses of the samples or of their tokens."""
    return losses if losses.ndim == 1 else losses.sum(1)


def _check_last_gradient(tangents: Tangents, true: _Reference) -> None:
    """Raise if the gradient of the last perturbed value, where it was found, is another."""
    name, block = next(reversed(tangents.blocks.items()), (None, None))
    if name is None or block is None or block.request.last_gradient is None:
        return
    found, expected = block.request.last_gradient, true.of_values[name]
    slack = tolerance(expected) * (
        float(expected.norm()) + _NEARLY_ZERO * float(_of_samples(true.losses).norm())
    )
    if float((found - expected).norm()) > slack:
        raise VerificationError(
            "The gradient of the last perturbed value should be that of backpropagation. Found "
            f"another at {name!r}, on {len(found)} samples of the batch. {_HINT}"
        )


_HINT = (
    "Samples may depend on each other, their order may change inside the model, a first axis may "
    "not be the batch, or a function may not carry tangents. Try `perturb='weights'` or "
    "`Activations(sites=[...])`; docs/supported.md says what to look for."
)


def check_parameters(objective: Objective, found: Mapping[Any, Tensor], true: _Reference) -> None:
    names = {id(p): name for name, p in objective.model.named_parameters()}
    truth, losses = true.of_parameters, _of_samples(true.losses)
    total = sum(float(g.norm()) ** 2 for g in truth.values()) ** 0.5
    slack = tolerance(losses)
    wrong = []
    for parameter, gradient in truth.items():
        own = found.get(parameter, torch.zeros_like(gradient)).to(gradient.dtype)
        difference = float((own - gradient).norm())
        floor = 1e-2 * total + _NEARLY_ZERO * float(losses.abs().mean())
        if difference > slack * (float(gradient.norm()) + floor):
            wrong.append(names.get(id(parameter), f"a tensor of shape {list(parameter.shape)}"))
    if wrong:
        raise VerificationError(
            "The local steps should give the gradients of backpropagation. Found others for "
            f"{', '.join(wrong)}. Try `perturb='weights'`, or `Activations(sites=[...])` with a "
            "module around all that uses them; docs/supported.md says what to look for."
        )
