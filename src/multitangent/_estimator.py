"""What forward gradients and their simulation have in common: everything but the derivatives."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from multitangent._assessment import Assessment, assess
from multitangent._batch import Part, shapes, whole
from multitangent._coefficients import Combination, combination
from multitangent._compiled import CompiledStep, Step, compiled_step
from multitangent._diagnostics import Diagnostics, diagnose
from multitangent._per_sample_loss import PerSampleLoss
from multitangent.aggregation import Aggregator, Projection
from multitangent.dual import Statistics, record_fallbacks
from multitangent.perturbation import (
    Activations,
    Line,
    Perturbation,
    Setting,
    Sweep,
    Weights,
    line,
    micro_batch_size,
    normalizes_batches,
)
from multitangent.tangents import Lesson, Normal, Stream, TangentSource


class GradientEstimator(ABC):
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
    ) -> None:
        check_kinds(tangents, aggregator)
        _check_options(model, loss, seed, store_tangents, tangent_dtype, compile)
        self.model = model
        self.loss = loss
        self.tangents = Normal(16) if tangents is None else tangents
        self.aggregator = Projection() if aggregator is None else aggregator
        self.perturb = _perturbation(perturb)
        self.seed = seed
        self.micro_batch = micro_batch
        self.store_tangents = store_tangents
        self.tangent_dtype = tangent_dtype
        self.compile = compile
        self.step = 0
        self._source = self.tangents.started()
        self._sizes: dict[Any, int] = {}
        self._graphs: dict[Any, CompiledStep | None] = {}
        self._last_step: tuple[Combination, Tensor, set[str]] | None = None
        self._last_batch: tuple[Setting, Part] | None = None
        self._per_sample = PerSampleLoss(loss)
        if micro_batch != "auto" and (not isinstance(micro_batch, int) or micro_batch < 1):
            raise ValueError(
                "`micro_batch` should be 'auto' or an integer of at least 1. "
                f"Found {micro_batch!r}."
            )
        self._bind()  # so that a model that does not fit is an error here, not later

    def __call__(self, inputs: Any, target: Any) -> Tensor:
        """Fill ``.grad`` of every trainable parameter, adding to what is there.

        Args:
            inputs: The model's input, ``[B, ...]``; a tuple or a mapping for several.
            target: What the loss compares with, ``[B, ...]``.

        Returns:
            The loss of the batch, mean or sum as the loss says, a detached scalar.

        Raises:
            RuntimeError: Inside ``torch.inference_mode()``.
            ValueError: If a loss, a directional derivative or a Gram matrix is not finite.
        """
        batch = self._accepted(inputs, target)
        with record_fallbacks() as fallbacks:
            losses, combined, gram = self._one_step(batch)
        self._last_step = combined, gram, fallbacks
        self.step += 1
        return losses.sum() * self._per_sample.scale(batch.size)

    def _accepted(self, inputs: Any, target: Any) -> Part:
        """The batch, once the sites are those of what is trainable now."""
        refuse_inference_mode()
        if [p.requires_grad for p in self._parameters] != self._trainable:
            self._bind()
        return whole(inputs, target)

    def _one_step(self, batch: Part) -> Step:
        """One step, compiled if that is wanted and possible."""
        setting = self._setting(batch)
        self._last_batch = setting, batch
        if self.compile:
            key = self._signature(batch)
            at_once = replace(setting, micro_batch=batch.size, store_tangents=True)
            if key not in self._graphs:
                self._graphs[key] = compiled_step(self, at_once, batch)
            graph = self._graphs[key]
            if graph is not None and (step := graph(at_once, batch)) is not None:
                return step
        return self._eager(setting, batch)

    def _signature(self, batch: Part) -> Any:
        """What a graph is made for."""
        modes = tuple(module.training for module in self.model.modules())
        parts = self.tangents, self.aggregator, self.perturb, self.tangent_dtype
        return shapes(batch), modes, repr(parts), torch.is_autocast_enabled("cpu")

    def _eager(self, setting: Setting, batch: Part) -> Step:
        sweep, losses, jvps = self._differentiated(setting, batch)
        combined, gram, gradients = self._combined(sweep, jvps)
        if self._source.learns:
            self._source.learn(_lesson(sweep, self._source, gradients))
        return Step(losses, combined, gram)

    def _combined(
        self, sweep: Sweep, jvps: Tensor
    ) -> tuple[Combination, Tensor, dict[str, Tensor]]:
        """The coefficients, the Gram matrix and the gradients of the perturbed values.

        The gradients of the parameters are added to ``.grad``.
        """
        with torch.autocast(jvps.device.type, enabled=False):
            gram, dimension = sweep.tangents.gram(), sweep.tangents.dimension
            combined = combination(self._source, self.aggregator, gram, jvps, dimension)
            gradients = sweep.pull(combined.coefficients)
        return combined, gram, gradients

    def _differentiated(self, setting: Setting, batch: Part) -> tuple[Sweep, Tensor, Tensor]:
        """The sweep of a batch, its losses and directional derivatives."""
        statistics = [b for m in self.model.modules() if normalizes_batches(m) for b in m.buffers()]
        before = [buffer.clone() for buffer in statistics]
        while True:
            sweep = self._sweep(setting, batch)
            try:
                return sweep, *self._differentiate(sweep)
            except torch.OutOfMemoryError:
                if setting.micro_batch == 1:
                    raise
            # Only here, outside of the handler, nothing holds the tensors that did not fit.
            del sweep
            half = setting.micro_batch // 2
            warnings.warn(
                f"micro_batch={setting.micro_batch} does not fit the memory of the device: going "
                f"on with {half}.",
                stacklevel=5,
            )
            self._sizes[shapes(batch)] = half
            for buffer, value in zip(statistics, before, strict=True):
                buffer.copy_(value)
            setting = replace(setting, micro_batch=half)

    def _setting(self, batch: Part) -> Setting:
        """What the step at hand knows."""
        setting = Setting(
            model=self.model,
            loss=self._per_sample,
            source=self._source,
            stream=Stream(self.seed, self.step),
            correction=self._per_sample.correction(batch.target),
            micro_batch=batch.size,
            store_tangents=self.store_tangents,
            tangent_dtype=self.tangent_dtype,
        )
        key = shapes(batch)
        if key not in self._sizes:
            self._sizes[key] = (
                micro_batch_size(setting, batch, self._sweep.sites)
                if self.micro_batch == "auto"
                else min(self.micro_batch, batch.size)
            )
        return replace(setting, micro_batch=self._sizes[key])

    def _bind(self) -> None:
        """Find the sites, which depend on what is trainable."""
        self._parameters = list(self.model.parameters())
        self._trainable = [p.requires_grad for p in self._parameters]
        self._sizes, self._graphs = {}, {}
        self._sweep = self.perturb.bind(self.model)

    def _options(self) -> str:
        """The rarer arguments, where they are not the default."""
        shown = {"store_tangents": True, "tangent_dtype": None, "compile": False}
        return "".join(
            f", {name}={getattr(self, name)!r}"
            for name, default in shown.items()
            if getattr(self, name) != default
        )

    def along(self, direction: Mapping[str, Tensor], *, curvature: bool = True) -> Line:
        """The loss of the last batch along a direction: its slope and curvature, per sample.

        One pass of forward mode over forward mode at the parameters as they are now; dropout draws
        the masks of the last step, batch normalisation uses the batch's statistics.

        Args:
            direction: Tensors by names of parameters; those without one stay where they are.
            curvature: Whether to differentiate a second time.

        Raises:
            RuntimeError: Before the first step.
            ValueError: If a direction does not fit a parameter.

        Examples:
            >>> from multitangent import ForwardGradient
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> gradient = ForwardGradient(model, torch.nn.MSELoss())
            >>> value = gradient(torch.ones(3, 2), torch.zeros(3, 1))
            >>> gradient.along({"weight": torch.ones(1, 2)}).curvature  # of (w_1 + w_2)^2
            tensor(8.)
        """
        if self._last_batch is None:
            raise RuntimeError(
                "`along` should be called after a step, whose batch it uses. Found none yet. Try "
                "to call the gradient with a batch first."
            )
        return line(*self._last_batch, direction, curvature=curvature)

    def assess(self, inputs: Any, target: Any) -> Assessment:
        """The gradient that the next step would take of a batch, beside the true one.

        Nothing changes: neither gradients nor buffers, the count of the steps or what sources have
        learned. It costs a step and two of backpropagation.

        Args:
            inputs: As for a step.
            target: As for a step.

        Examples:
            Six tangents span all n = 5 activations:

            >>> from multitangent import ForwardGradient, Normal
            >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
            >>> gradient = ForwardGradient(model, nn.CrossEntropyLoss(), Normal(4) + Normal(2))
            >>> found = gradient.assess(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))
            >>> round(found.cosine, 3), sorted(found.cosines)
            (1.0, ['0', '2'])
            >>> found.captured["Normal(num_tangents=4)"] < 0.999 < found.captured["all"]
            True
        """
        batch = self._accepted(inputs, target)
        with record_fallbacks():
            return assess(self, self._setting(batch), batch)

    _statistics: Statistics = "hold"  # what batch normalisation does along tangents

    @abstractmethod
    def _differentiate(self, sweep: Sweep) -> tuple[Tensor, Tensor]:
        """The losses ``[b]`` and the directional derivatives ``[K]`` or ``[K, b]``."""

    @property
    def diagnostics(self) -> Diagnostics:
        """What the last step measured.

        Raises:
            RuntimeError: Before the first step.
        """
        if self._last_step is None:
            raise RuntimeError(
                "`diagnostics` should be read after a step. Found none yet. Try to call the "
                "gradient with a batch first."
            )
        return diagnose(*self._last_step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the seed, the count of the steps, what sources learned."""
        return {"seed": self.seed, "step": self.step, "tangents": self._source.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.seed, self.step = int(state["seed"]), int(state["step"])
        device = self._parameters[0].device

        def here(value: Any) -> Any:  # a copy; counts stay where optimisers keep them
            if not isinstance(value, Tensor):
                return value
            return value.to(device if value.ndim else value.device, copy=True)

        self._source.load_state_dict(pytree.tree_map(here, dict(state.get("tangents", {}))))

    def __repr__(self) -> str:
        loss = (
            self.loss
            if isinstance(self.loss, nn.Module)
            else getattr(self.loss, "__name__", repr(self.loss))
        )
        return (
            f"{type(self).__name__}({type(self.model).__name__}(...), {loss}, "
            f"tangents={self.tangents}, aggregator={self.aggregator}, perturb={self.perturb}, "
            f"seed={self.seed}, micro_batch={self.micro_batch!r}{self._options()})"
        )


def _lesson(sweep: Sweep, source: TangentSource, gradients: dict[str, Tensor]) -> Lesson:
    blocks = sweep.tangents.blocks
    # Drawn before anyone learns: where tangents are not stored, a memory that changed changes them.
    seen = blocks if sweep.output_tangents is not None else {}
    return Lesson(
        requests={name: block.request for name, block in blocks.items()},
        tangents={name: block.rows() for name, block in seen.items()},
        informed=source.informed,
        gradients=gradients,
        output_tangents=sweep.output_tangents,
    )


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


def _check_options(
    model: object,
    loss: object,
    seed: object,
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
    if type(model).__name__ == "OptimizedModule":  # its home takes a second to import
        raise TypeError(
            "`model` should be a plain module, whose functions can be followed one by one. Found "
            "one that torch.compile made. Try the module itself, with `compile=True` here."
        )


def _perturbation(perturb: Literal["activations", "weights"] | Perturbation) -> Perturbation:
    if perturb == "activations":
        return Activations()
    if perturb == "weights":
        return Weights()
    if isinstance(perturb, (Activations, Weights)):
        return perturb
    raise ValueError(
        "`perturb` should be 'activations', 'weights', or an Activations or Weights object. Found "
        f"{perturb!r}."
    )


def refuse_inference_mode() -> None:
    """Raise inside ``torch.inference_mode()``."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "A gradient should be taken outside torch.inference_mode(), whose tensors can not be "
            "recorded for the local step. Found it enabled. Try torch.no_grad() in its place."
        )
