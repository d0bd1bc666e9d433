"""What forward gradients and their simulation have in common: everything but the engine."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from multitangent._structures import copied
from multitangent.aggregation import Aggregator, Projection
from multitangent.dual import record_fallbacks
from multitangent.engine import Engine, SplitError, Trial, run_few
from multitangent.gradient._arguments import (
    check_as_they_are,
    check_generator,
    check_kinds,
    check_mesh,
    check_options,
    check_state,
    check_verify,
    objective_of,
    perturbation_of,
    refuse_backward_hooks,
    refuse_inference_mode,
)
from multitangent.gradient._compiled import CompiledStep, compiled_step
from multitangent.gradient._grad import accumulate, hooked
from multitangent.gradient._inspectable import Inspectable
from multitangent.gradient._kinds import found_parameters, kind_of
from multitangent.gradient._learned import kind_of_step, learn, structure, unchanged_on_error
from multitangent.gradient._split_data import check_split, check_statistics
from multitangent.gradient._step import Problem, Step, step
from multitangent.gradient._verify import verify
from multitangent.objective import Batch
from multitangent.parallel import Parallel
from multitangent.perturbation import Perturbation
from multitangent.tangents import Normal, Stream, TangentSource


class GradientEstimator(Inspectable):
    """A gradient estimated from directional derivatives, in place of ``loss.backward()``."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        tangents: TangentSource | None = None,
        aggregator: Aggregator | None = None,
        perturb: Literal["activations", "weights"] | Perturbation = "activations",
        seed: int = 0,
        micro_batch: int | Literal["auto"] = "auto",
        store_tangents: bool = True,
        tangent_dtype: torch.dtype | None = None,
        compile: bool = False,
        verify: Literal["first", "always", "parts", False] = "first",
        mesh: DeviceMesh | None = None,
        generator: Literal["torch", "philox"] = "torch",
    ) -> None:
        check_kinds(tangents, aggregator)
        check_options(model, loss, seed, micro_batch, store_tangents, tangent_dtype, compile)
        check_verify(verify)
        check_mesh(mesh, compile=compile)
        check_generator(generator)
        self.model = model
        self.loss = loss
        self.tangents = Normal(16) if tangents is None else tangents
        self.aggregator = Projection() if aggregator is None else aggregator
        self.perturb = perturbation_of(perturb)
        self.seed = seed
        self.micro_batch = micro_batch
        self.store_tangents = store_tangents
        self.tangent_dtype = tangent_dtype
        self.compile = compile
        self.verify = verify
        self.mesh = mesh
        self.generator = generator
        self._parallel = Parallel(mesh)
        self.step = 0
        self._source = self.tangents.init()
        self._objective = objective_of(model, loss, self.perturb)
        tokens = self._objective.has_tokens
        check_as_they_are(self.tangents, self.aggregator, has_tokens=tokens)
        self._bind()  # so that a model that does not fit is an error here, not later

    @abstractmethod
    def _engine(self, trial: Trial) -> Engine:
        """How directional derivatives are obtained."""

    def _verified_trial(self, batch: Batch, stream: Stream, trial: Trial) -> Trial:
        """What is known about batches of this kind, after a comparison that may find faults."""
        alone = self._problem(is_shared=False)
        bind, objective = self.perturb.bind, self._objective
        return verify(alone, bind, objective, self._engine, batch, stream, trial)

    def __call__(self, inputs: Any, target: Any = None) -> Tensor:
        """Fill ``.grad`` of every trainable parameter, adding to what is there.

        Args:
            inputs: The model's input, ``[B, ...]``; a tuple or a mapping for several.
            target: What the loss compares with, ``[B, ...]``; ``None`` for a loss that needs none,
                such as one that the model computes.

        Returns:
            The loss of the batch, mean or sum as the loss says, a detached scalar.

        Raises:
            RuntimeError: Inside ``torch.inference_mode()``.
            ValueError: If a loss, a directional derivative or a Gram matrix is not finite.
        """
        with record_fallbacks() as fallbacks:
            problem, batch, stream = self.prepare(inputs, target)
            result = self._compiled(problem, batch, stream) or self._eager(problem, batch, stream)
            loss = self._parallel.total(result.losses.sum() * self._objective.scale(batch))
        if self._parallel.splits_data:
            check_split(result, self.tangents)
            of_all = self._parallel.gradients(result.gradients, per_sample=result.per_sample)
            result = replace(result, gradients=of_all)
        gradients = self._learned(result)
        for parameter, gradient in gradients.items():
            accumulate(parameter, gradient)
        self._last_step = result.combination, result.gram, fallbacks
        self._last_batch = batch, stream
        if result.tangents is not None:
            self._sizes = {n: block.dimension for n, block in result.tangents.blocks.items()}
        self.step += 1
        for parameter in gradients:
            for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
                hook(parameter)
        return loss

    def _learned(self, result: Step) -> dict[nn.Parameter, Tensor]:
        """Tell the source of a step; returns the gradients that the hooks of parameters leave."""
        restores = unchanged_on_error(self._source) if result.teaches else nullcontext()
        with restores:
            learn(self._source, result)  # before hooks change the gradients
            return {p: hooked(p, gradient) for p, gradient in result.gradients.items()}

    def prepare(self, inputs: Any, target: Any = None) -> tuple[Problem, Batch, Stream]:
        """What the next step is made of.

        ``multitangent.gradient.step(*gradient.prepare(inputs, target))`` is that step. Only the
        model's buffers learn of it: no ``.grad`` is filled, and the next step is the same one.

        Args:
            inputs: As for a step.
            target: As for a step.

        Examples:
            >>> from multitangent import ForwardGradient
            >>> gradient = ForwardGradient(nn.Linear(3, 2), nn.MSELoss())
            >>> result = step(*gradient.prepare(torch.ones(4, 3), torch.zeros(4, 2)))
            >>> result.losses.shape, gradient.step
            (torch.Size([4]), 0)
        """
        refuse_inference_mode()
        self._modules = list(self.model.modules())
        refuse_backward_hooks(self._modules, self.model)
        if isinstance(self.loss, nn.Module):
            refuse_backward_hooks(list(self.loss.modules()), self.loss)
        if found_parameters(self._modules) != self._bound_to:
            self._bind()
        batch = self._objective.batch(inputs, target, self._parallel.share)
        stream = Stream(self.seed, self.step, self.generator)
        self._parallel.check(self.model, stream)
        self._kind = kind_of(batch, self._modules, self._device)
        trial = self._trial(batch, stream)
        if self._parallel.splits_data:
            check_statistics(trial, batch, self._modules)
        batch = replace(batch, shapes_of_few=trial.shapes)
        is_new = self.verify == "first" and self._kind not in self._verified
        if self.verify == "always" or is_new:
            trial = self._verified_trial(batch, stream, self._trials[self._kind])
            self._trials[self._kind] = trial
            self._verified.add(self._kind)
        return self._problem(), batch, stream

    def _problem(self, *, is_shared: bool = True) -> Problem:
        """What the next step differentiates, with what is known about batches of its kind.

        Args:
            is_shared: Whether other processes take the same step.
        """
        trial = self._trials[self._kind]
        if self._kind not in self._compared or self.verify == "always":
            compares = trial.is_plain and self.verify == "parts"
            trial = replace(trial, is_plain=compares, compares=compares)
        problem = Problem(
            self._bound,
            self._source,
            self.aggregator,
            self._engine(trial),
            self.store_tangents,
            self.tangent_dtype,
        )
        if not (is_shared and self._parallel):
            return problem
        engine = self._parallel.engine(problem.engine)
        return replace(problem, engine=engine, reduce=self._parallel.reduce)

    def _bind(self) -> None:
        """Find the sites, which depend on what is trainable."""
        self._bound_to = found_parameters(list(self.model.modules()))
        self._sizes = None
        self._trials: dict[Any, Trial] = {}
        self._verified: set[Any] = set()
        self._compared: set[Any] = set()  # kinds whose parts gave the whole's losses
        self._graphs: dict[Any, CompiledStep | None] = {}
        self._bound = self.perturb.bind(self._objective)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _trial(self, batch: Batch, stream: Stream) -> Trial:
        """What is known about batches of this kind."""
        if self._kind not in self._trials:
            pushed = self._parallel.most_tangents(self._source.num_tangents)
            trial = run_few(self._bound, self._objective, batch, stream, self._source, pushed)
            if self.micro_batch != "auto" and not trial.is_whole:
                trial = replace(trial, micro_batch=min(self.micro_batch, batch.size))
            self._trials[self._kind] = trial
        return self._trials[self._kind]

    def _compiled(self, problem: Problem, batch: Batch, stream: Stream) -> Step | None:
        """One step by a compiled graph, if that is wanted and possible."""
        if not self.compile:
            return None
        key = self._signature(stream)
        if key not in self._graphs:
            whole = replace(self._trial(batch, stream), micro_batch=batch.size)
            at_once = replace(problem, engine=self._engine(whole), store_tangents=True)
            self._graphs[key] = compiled_step(at_once, self.perturb, self._objective, batch, stream)
        graph = self._graphs[key]
        return None if graph is None else graph(batch, stream)

    def _signature(self, stream: Stream) -> Any:
        """What a graph is made for."""
        parts = self.tangents, self.aggregator, self.perturb, self.tangent_dtype
        state = structure(self._source.state_dict())
        return *self._kind, repr(parts), kind_of_step(self._source, stream.step), state

    def _eager(self, problem: Problem, batch: Batch, stream: Stream) -> Step:
        """One step; where it does not go with so many samples at a time, with others."""
        try:
            return self._fitting(problem, batch, stream)
        finally:
            self._objective.release()

    def _fitting(self, problem: Problem, batch: Batch, stream: Stream) -> Step:
        first = self._trials[self._kind]
        may_return = first.has_state or first.micro_batch < batch.size
        saved = self._objective.saved_state(with_generators=False) if may_return else None
        while True:
            trial = self._trials[self._kind]
            try:
                result = step(problem, batch, stream)
                self._compared.add(self._kind)
                return result
            except torch.OutOfMemoryError:
                if trial.micro_batch == 1:
                    raise
                size, reason = trial.micro_batch // 2, "does not fit the memory of the device"
            except SplitError as error:
                if trial.micro_batch == batch.size:
                    raise
                size, reason = batch.size, f"splits what belongs together ({error})"
            # Only here, outside of the handler, nothing holds the tensors that did not fit.
            warnings.warn(
                f"micro_batch={trial.micro_batch} {reason}: going on with {size}.", stacklevel=3
            )
            if saved is not None:
                saved.restore()
            self._trials[self._kind] = replace(trial, micro_batch=size)
            problem = replace(problem, engine=self._problem().engine)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the seed, the count of the steps, what sources learned."""
        return {
            "seed": self.seed,
            "step": self.step,
            "tangents": self._source.state_dict(),
            "source": repr(self.tangents),
            "generator": self.generator,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: If it is that of other tangents.
        """
        check_state(state, self.tangents, self.generator)
        self.seed, self.step = int(state["seed"]), int(state["step"])
        self._source.load_state_dict(copied(dict(state.get("tangents", {})), self._device))

    def __repr__(self) -> str:
        loss = getattr(self.loss, "__name__", repr(self.loss))
        return (
            f"{type(self).__name__}({type(self.model).__name__}(...), {loss}, "
            f"tangents={self.tangents}, aggregator={self.aggregator}, perturb={self.perturb}, "
            f"seed={self.seed}, micro_batch={self.micro_batch!r}{self._options()})"
        )

    def _options(self) -> str:
        """The rarer arguments, where they are not the default."""
        shown = {
            "store_tangents": True,
            "tangent_dtype": None,
            "compile": False,
            "verify": "first",
            "mesh": None,
            "generator": "torch",
        }
        return "".join(
            f", {name}={getattr(self, name)!r}"
            for name, default in shown.items()
            if getattr(self, name) != default
        )
