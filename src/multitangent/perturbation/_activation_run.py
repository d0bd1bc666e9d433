"""The run of activity perturbation: layers are recorded, gradients pulled back inside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multitangent._structures import map_tensors
from multitangent.dual import DualTensor, ordinary_afterwards, primal, without_base
from multitangent.objective import (
    Batch,
    BatchMode,
    BatchRecord,
    Change,
    Evaluation,
    GraphQuery,
    Objective,
    SavedState,
    Statistics,
    gradient_by,
    output_tensor,
)
from multitangent.perturbation._ending import Ending, Injection, OtherEndError
from multitangent.perturbation._hooks import Injector, Visitor, observed
from multitangent.perturbation._perturbation import (
    Inject,
    again,
    check_unwritten,
    no_injection,
    reading,
    zero_injection,
)
from multitangent.perturbation._pullback import LocalPullback
from multitangent.perturbation._sites import Site, first_block
from multitangent.tangents import Needs, Stream, Tangents

_RUNS = 4  # in which it shows how a model ends


class ActivationRun:
    """A batch, run through the model with something in place of the outputs of sites.

    Args:
        objective: The model and its loss.
        batch: The whole batch.
        stream: The random numbers of the step.
        tangents: Where blocks are added.
        sites: What is perturbed.
        own_tangents: Whether samples have tangents of their own.
        ending: How the model ends, if the loss's own derivative is used there.
        recompute: Whether layers run again for their local step.
        discount: The discount of a token's loss for the positions before it; ``None`` for losses of
            samples.
    """

    per_sample = True

    def __init__(
        self,
        objective: Objective,
        batch: Batch,
        stream: Stream,
        tangents: Tangents,
        *,
        sites: Sequence[Site],
        own_tangents: bool,
        ending: Ending | None,
        recompute: bool,
        discount: float | None = None,
    ) -> None:
        self.batch = batch
        self._versions = batch.versions
        self.discount = discount
        self.scale = objective.scale(batch)
        self.tangents = tangents
        self._objective = objective
        self._stream = stream
        self._sites = sites
        self._own_tangents = own_tangents
        self._ending = ending
        # Where layers run again for their local step, memory is short.
        self._record = BatchRecord(reuse=not recompute)
        trained = [p for p in objective.model.parameters() if p.requires_grad]
        self._pullback = LocalPullback(trained, recompute=recompute)
        self._last: Injection | None = None
        self._output_gradient: Tensor | None = None
        self._watched: Tensor | None = None  # the last perturbed value, if its gradient is needed
        self.unperturbed: dict[str, torch.Size] = {}  # first outputs, not of each sample
        self._change: Change | None = None  # by the run of the whole batch
        self.starts_after = False

    def record(self, inject: Inject) -> Evaluation:
        if inject is no_injection:
            return self._plainly(self._objective.saved_state())
        return self._recorded(inject, record=None)

    def prepare(self, *, certainly: bool = False) -> Tensor:
        before = self._objective.saved_state()
        with reading(self.batch):
            losses = primal(self._plainly(before, self._record).losses)
        self._change = Change(before)
        return losses

    def _plainly(self, before: SavedState, record: BatchRecord | None = None) -> Evaluation:
        """Run the whole batch with no value replaced, whatever the model asks its tensors."""
        try:
            return self._recorded(no_injection, record)
        except GraphQuery:
            self._restart(before)
            with ordinary_afterwards():
                return self._recorded(zero_injection, None if record is None else self._record)

    def _restart(self, before: SavedState) -> None:
        check_unwritten(self.batch, self._versions)
        before.restore()
        self.tangents.blocks.clear()
        self._watched = None
        self._pullback.restart()
        self._record = BatchRecord(reuse=not self._pullback.recompute)

    def _recorded(self, inject: Inject, record: BatchRecord | None) -> Evaluation:
        """Run the whole batch, and again while it shows that the model ends in another way."""
        if self._ending is None or self._knows_ending:
            return self._recorded_once(inject, record)
        before = self._objective.saved_state()
        for _ in range(_RUNS - 1):
            try:
                evaluation = self._recorded_once(inject, record)
                break
            except OtherEndError:
                self._restart(before)
                record = None if record is None else self._record
        else:
            evaluation = self._recorded_once(inject, record)
        self._ending.is_known = True
        return evaluation

    @property
    def _knows_ending(self) -> bool:
        """Whether a run has shown how the model ends, as far as that is needed."""
        assert self._ending is not None
        is_watched = not self._needs_last_gradient or self._ending.value is not None
        return self._ending.is_known and is_watched

    def _recorded_once(self, inject: Inject, record: BatchRecord | None) -> Evaluation:
        """Run the whole batch, drawing tangents and recording the layer at every site."""
        objective, batch = self._objective, self.batch
        with torch.no_grad(), objective.mode(batch, self._stream, "update", record=record) as mode:
            mode.records_graph = True
            mode.is_plain = inject is no_injection
            with observed(self._sites, _Recorder(self, mode, self._pullback, inject)):
                output = objective.output(batch)
            if self._ends_in_output:
                output = self._without_last_injection(output)
            needed = self._ends_in_output or self.tangents.needs & Needs.OUTPUT
            value = output_tensor(output).clone() if needed else None  # the loss may write into it
            leaf = self._leaf(output)
            output = output if leaf is None else leaf.clone()
            evaluation = objective.evaluation(output, batch, keep=self._keeps_output)
        losses = evaluation.losses
        if leaf is None:
            self._pullback.end(primal(losses), self._watched)
        else:
            self._output_gradient = gradient_by(leaf, losses)
        losses = losses.detached() if isinstance(losses, DualTensor) else losses.detach()
        if value is not None:
            if leaf is None:
                self._output_gradient = objective.output_gradient(value, batch, self._stream)
            assert self._output_gradient is not None
            self.tangents.with_output(value, self._output_gradient)
        elif not self.tangents.blocks and self._ending is None:
            raise ValueError(
                "`sites` should have outputs that depend on the samples. Found none: "
                f"{self._shared_outputs()}. Try `Activations(sites=[{self._next_place()}])` with "
                "the first module behind them whose output does, such as the first block of a "
                "transformer, or `perturb='weights'`."
            )
        if self._needs_last_gradient and self.tangents.blocks:
            self.tangents.with_last_gradient(self._last_gradient())
        return evaluation._replace(losses=losses)

    @property
    def _needs_last_gradient(self) -> bool:
        needs = self.tangents.needs
        return self._ending is not None and bool(needs & Needs.LAST_GRADIENT)

    def _last_gradient(self) -> Tensor:
        """The gradient of each sample's loss by the last perturbed value."""
        assert self._ending is not None
        name, expected = next(reversed(self.tangents.blocks)), self._ending.value
        if name != expected or self._watched is None:
            if not self._knows_ending:
                self._ending.value = name
                raise OtherEndError
            raise ValueError(
                "The last perturbed value should be the same in every run where its gradient is "
                f"a guess. Found {name!r} in place of {expected!r}. Try "
                "`Activations(sites=[...])` with modules that every run calls."
            )
        gradients = {}
        if self._ends_in_output:
            assert self._last is not None
            assert self._output_gradient is not None
            gradients[self._last.name] = self._output_gradient
        return self._pullback.differentiate_ending(self._watched, gradients, self.scale)

    def _shared_outputs(self) -> str:
        """The sites of which no output is perturbed, with the shapes of their outputs."""
        shapes = {name: list(shape) for name, shape in self.unperturbed.items()}
        found = ", ".join(f"{name!r} returns shape {shape}" for name, shape in shapes.items())
        return found or (
            "no site was called and returned a floating-point tensor; a model that calls "
            "`module.forward(...)` skips its sites"
        )

    def _next_place(self) -> str:
        """The first block of the model, if it is not a site yet."""
        name = first_block(self._objective.model)
        return "..." if name is None or name in {site.name for site in self._sites} else repr(name)

    def evaluate(
        self, part: Batch, inject: Inject, statistics: Statistics = "frozen", *, reuse: bool = False
    ) -> Evaluation:
        record = self._record if reuse else self._record.to_differentiate()
        injector = Injector(lambda value, name: inject(value, name, part.place_in(self.batch)))
        with (
            again(self._change, self.starts_after),
            self._objective.mode(part, self._stream, statistics, record=record),
        ):
            with observed(self._sites, injector):
                output = self._objective.output(part)
            return self._objective.evaluation(output, part, keep=self._keeps_output)

    @property
    def _ends_in_output(self) -> bool:
        """Whether the last site's output is the model's, as far as is known, and exact."""
        return self._ending is not None and self._ending.site is None

    def _leaf(self, output: Any) -> Tensor | None:
        """Where the graph of the losses begins, if their derivative can be taken from this run."""
        if type(output) is not Tensor or not self._ends_in_output:
            return None
        with torch._C.DisableTorchFunction():  # the model asks none of this
            is_end = not output.requires_grad and self._objective.loss.is_pure
            return output.detach().requires_grad_() if is_end else None

    @property
    def _keeps_output(self) -> bool:
        """Whether the output is looked at once the loss was taken."""
        return bool(self.tangents.needs & Needs.OUTPUT_TANGENTS)

    def pullback(self, gradients: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
        of_outputs = dict(gradients)
        if self._ends_in_output and self._watched is None:
            assert self._last is not None
            assert self._output_gradient is not None
            of_outputs[self._last.name] = self._output_gradient
        return self._pullback(
            of_outputs,
            self.scale,
            lambda calls: self._objective.mode(
                self.batch, self._stream, "coupled", dropout_calls=calls
            ),
        )

    def _without_last_injection(self, output: Any) -> Any:
        """The model's output as it was before the last site's tangents were added."""
        last = self._last
        assert self._ending is not None
        if last is None or output is not last.after or primal(output)._version != last.version:
            may_go_on = not self._ending.is_known and not self._pullback.recompute
            if last is not None and may_go_on:
                self._ending.site = last.name
                raise OtherEndError
            raise ValueError(
                "`output='exact'` needs a model whose output is that of its last site. Found "
                "other operations behind it. Try `output='perturbed'`, or `sites=[...]` with a "
                "last site that ends in the model's output."
            )
        del self.tangents.blocks[last.name]
        self._ending.output = last.name
        return last.before

    def is_perturbed(self, name: str, value: Tensor) -> bool:
        """Whether the first output of a site is perturbed, or stays in the next layer's graph.

        One that is not a value of each sample is not, such as an embedding of positions, windows of
        images, or time before the samples. It may have the batch's size by chance. Neither is one
        that depends on nothing that is trained.
        """
        if self._ending is not None and name == self._ending.site:
            return False
        is_unknown = self.batch.size > 1 and not self.batch.shapes_of_few
        if self._pullback.recompute or is_unknown:
            return True
        is_constant = type(value) is not DualTensor and not value.requires_grad
        if is_constant or value.ndim == 0 or value.shape[0] != self.batch.size:
            return False
        of_few = self.batch.shapes_of_few.get(name)  # of fewer samples, if there are several
        return self.batch.size == 1 or of_few is None or of_few[:1] != value.shape[:1]

    def replaced(self, name: str, value: Tensor, inject: Inject) -> Tensor:
        """What takes the place of one output of a site, once its tangents were added."""
        detached = value.detached() if isinstance(value, DualTensor) else value.detach()
        self._add_block(name, detached)
        if self._needs_last_gradient and self._ending is not None and name == self._ending.value:
            detached = self._begin_ending(detached)
        injected = inject(detached, name, slice(0, self.batch.size))
        self._last = Injection(name, detached, injected, primal(injected)._version)
        return injected

    def _begin_ending(self, value: Tensor) -> Tensor:
        """The last perturbed value, from which on a graph is recorded."""
        self._watched = primal(value).detach().requires_grad_()
        copy = self._watched.clone()  # into which the model may write
        return DualTensor(copy, value.tangents) if isinstance(value, DualTensor) else copy

    @property
    def is_in_ending(self) -> bool:
        """Whether the last perturbed value was passed, and what follows gives its gradient."""
        return self._watched is not None

    def _add_block(self, name: str, value: Tensor) -> None:
        size, rows = self.batch.size, self.batch.rows
        of_few = self.batch.shapes_of_few.get(name)  # of fewer samples, if there are several
        is_other = of_few is not None and size > 1 and of_few[:1] == value.shape[:1]
        if value.ndim == 0 or value.shape[0] != size or is_other:
            raise ValueError(
                f"`sites` should have outputs whose first axis is the batch, here {size}. "
                f"Found shape {list(value.shape)} at {name!r}. Try `Activations(sites=[...])` with "
                "modules around it, or `perturb='weights'`."
            )
        block = self.tangents.add(
            name,
            primal(value),
            value.shape[1:],
            samples=range(rows.start, rows.stop) if self._own_tangents else None,
            target=self.batch.target,
            loss=self._objective.loss,
        )
        block.may_be_unused = self._ending is not None and name == self._ending.output


class _Recorder(Visitor):
    """Puts something in the place of every site's outputs, and records the layers."""

    def __init__(
        self, run: ActivationRun, mode: BatchMode, pullback: LocalPullback, inject: Inject
    ) -> None:
        super().__init__()
        self._run = run
        self._mode = mode
        self._pullback = pullback
        self._inject = inject

    def enter(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        super().enter(site, args, kwargs)
        with torch._C.DisableTorchFunction():
            if kwargs or not all(isinstance(arg, Tensor) for arg in args):
                args, kwargs = map_tensors(without_base, (args, kwargs))
            else:
                args = tuple(without_base(arg) for arg in args)
        self._mode.records_graph = not self._pullback.recompute or self._run.is_in_ending
        self._pullback.enter(site, args, kwargs, self._mode.dropout.calls)
        return args, kwargs

    def leave(self, site: Site, output: Any) -> Any:
        if not self._ends(site):
            return output
        self._mode.records_graph = True

        def replace(value: Tensor, name: str) -> Tensor:
            if not self._run.is_perturbed(name, value):
                self._run.unperturbed[name] = primal(value).shape
                return value
            self._pullback.leave(name, primal(value))
            return self._run.replaced(name, value, self._inject)

        def replace_other(value: Tensor, name: str) -> Tensor:
            return replace(value, name) if self._pullback.recompute else value

        return self._replaced(site, output, replace, replace_other)
