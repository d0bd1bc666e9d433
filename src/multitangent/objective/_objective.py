"""How a batch runs through a model to the losses of its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from multitangent.dual import foreign_functions, primal, sweep
from multitangent.objective._batch import Batch, arguments, whole_batch
from multitangent.objective._batch_mode import BatchMode
from multitangent.objective._batch_norm import Statistics
from multitangent.objective._per_sample_loss import PerSampleLoss
from multitangent.objective._record import BatchRecord
from multitangent.objective._replaced import replaced
from multitangent.objective._state import SavedState, dual_names, release
from multitangent.objective._uncompiled import uncompiled
from multitangent.tangents import IndependentRows, Stream

Share = Callable[[Batch, float], tuple[Batch, float]]


class Evaluation(NamedTuple):
    """What came of a run of the model.

    Attributes:
        losses: Of the samples, ``[b]``; of their tokens, ``[b, T]``, if the objective has tokens.
        output: The model's output.
    """

    losses: Tensor
    output: Any


class Objective:
    """A model and its loss: from a batch to one number per sample.

    Args:
        model: The model.
        loss: A callable ``(output, target) -> [B]``, of which the mean is meant, or a loss module
            of PyTorch, whose ``reduction`` is read.
        takes_scalar: Whether the loss may also return one number for the whole batch, which then
            counts as the loss of every sample.
        has_tokens: Whether evaluations have the losses of tokens, which add up to the losses of
            the samples. A callable then returns ``[B, T]``, and the loss of a sample is the mean
            over T.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        *,
        takes_scalar: bool = False,
        has_tokens: bool = False,
    ) -> None:
        self.model = model
        self.loss = PerSampleLoss(loss, takes_scalar=takes_scalar, has_tokens=has_tokens)
        self.has_tokens = has_tokens
        self.given_loss = loss
        self._loss_modules = [loss] if isinstance(loss, nn.Module) else []
        self._modules = [model, *self._loss_modules]

    def batch(self, inputs: Any, target: Any, share: Share | None = None) -> Batch:
        """A whole batch.

        Args:
            inputs: The model's input, ``[B, ...]``; a tuple or a mapping for several.
            target: What the loss compares with, ``[B, ...]``.
            share: From these samples, and what a weighted mean over them divides by, to the same as
                a part of the samples of several processes, and of all of them.

        Raises:
            ValueError: If there is no sample, or no label that counts.
        """
        batch = whole_batch(inputs, target)
        weight = self.loss.weight(batch.target, batch.size)
        if share is not None:
            batch, weight = share(batch, weight)
        if not weight:
            raise ValueError(
                "`target` should have a label that counts: the mean is one over those. Found a "
                "batch whose labels are all ignored or have no weight. Try to leave it out."
            )
        return replace(batch, correction=batch.batch_size / weight)

    def output(self, part: Batch, parameters: Mapping[str, Tensor] | None = None) -> Any:
        """The model's output for some samples.

        Args:
            part: The samples.
            parameters: What takes the place of parameters and buffers, by name.
        """
        args, kwargs = arguments(part.inputs)
        if parameters is None:
            return self.model(*args, **kwargs)
        with replaced(self.model, parameters):
            return self.model(*args, **kwargs)

    def losses(self, output: Any, part: Batch) -> Tensor:
        """The losses ``[b]`` of some samples."""
        losses = self.loss(output, part.target, part.correction, part.has_target_per_sample)
        if self.loss.is_of_batch:
            return losses.expand(part.size)
        _check_count(losses, part)
        return losses

    def token_losses(self, output: Any, part: Batch) -> Tensor:
        """The losses ``[b, T]`` of the tokens of some samples, which add up to `losses`."""
        losses = self.loss.of_tokens(
            output, part.target, part.correction, part.has_target_per_sample
        )
        _check_count(losses, part)
        return losses

    def evaluation(self, output: Any, part: Batch, *, keep: bool = False) -> Evaluation:
        """The losses of an output, and that output.

        Args:
            output: The model's output.
            part: The samples.
            keep: Whether the output stays as it is even if the loss writes into it.
        """
        kept = output.clone() if keep and isinstance(output, Tensor) else output
        losses = self.token_losses(output, part) if self.has_tokens else self.losses(output, part)
        return Evaluation(losses, kept)

    def scale(self, batch: Batch) -> float:
        """The weight of one sample's loss in the loss of the batch."""
        return self.loss.scale(batch.batch_size)

    def output_gradient(self, output: Tensor, batch: Batch, stream: Stream) -> Tensor:
        """The loss's own derivative with respect to the model's output, ``[B, *shape]``."""
        is_pure = self.loss.is_pure
        saved = None if is_pure else SavedState(self._loss_modules)
        surroundings: AbstractContextManager[object] = (
            nullcontext() if is_pure else self.mode(batch, stream, "coupled")
        )
        with torch.enable_grad(), surroundings:
            leaf = output.detach().requires_grad_()
            losses = self.losses(leaf.clone(), batch)  # into which the loss may write
        if saved is not None:
            saved.restore()
        return gradient_by(leaf, losses)

    @contextmanager
    def mode(
        self,
        part: Batch,
        stream: Stream,
        statistics: Statistics,
        *,
        record: BatchRecord | None = None,
        dropout_calls: int = 0,
    ) -> Iterator[BatchMode]:
        """Run some samples with the random numbers of a step, whatever the split of its batch.

        Args:
            part: The samples.
            stream: The random numbers of the step.
            statistics: What batch normalisation in training mode does: see `BatchMode`.
            record: What the whole batch leaves for its parts.
            dropout_calls: How many calls of dropout came before.
        """
        mode = BatchMode(
            partial(_uniform, stream),
            part.rows,
            part.batch_size,
            statistics,
            record,
            records_graph=torch.is_grad_enabled(),
        )
        device, cpu = part.device, torch.device("cpu")
        random = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with random, uncompiled(), foreign_functions(), sweep(), torch.enable_grad(), mode:
            # Other random functions repeat themselves too, for the same split of the batch.
            key = stream.fold_in("other", part.rows.start)
            torch.set_rng_state(stream.generator(cpu, key).get_state())
            if device.type == "cuda":
                torch.cuda.set_rng_state(stream.generator(device, key).get_state(), device)
            mode.dropout.calls = dropout_calls
            yield mode

    def release(self) -> None:
        """Let modules keep plain tensors where they have kept dual ones of a step."""
        release(self._modules)

    def dual_names(self) -> list[str]:
        """The names of dual tensors that modules keep."""
        return dual_names(self._modules)

    def saved_state(self, *, with_generators: bool = True) -> SavedState:
        """What the modules of model and loss keep now.

        Args:
            with_generators: Whether the states of Python's and NumPy's random generators count.
        """
        return SavedState(self._modules, with_generators=with_generators)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Leave what modules keep as it is now, whatever happens in a ``with`` block."""
        saved = self.saved_state()
        try:
            yield
        finally:
            saved.restore()


def _check_count(losses: Tensor, part: Batch) -> None:
    if losses.shape[0] != part.size:
        raise ValueError(
            "`loss` should return one number per sample. Found "
            f"{losses.shape[0]} numbers for {part.size} samples."
        )


def output_tensor(output: Any) -> Tensor:
    """The primal of a model's output, which should be one tensor."""
    value = primal(output)
    if not isinstance(value, Tensor):
        raise ValueError(
            "The model should return one tensor, by which the loss is differentiated. Found "
            f"{type(value).__name__}. Try a module around the model that returns the tensor "
            "the loss is computed from."
        )
    return value.detach()


def _uniform(stream: Stream, call: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Uniform numbers for one call of dropout."""
    if stream.kind == "philox":
        place = ("dropout", call)
        rows = IndependentRows(stream, 0, tuple(shape), None, 0, torch.float32, device, place)
        return rows.uniform(1)[0, 0]

    def draw(stream: Stream) -> Tensor:
        generator = stream.generator(device, stream.fold_in("dropout", call))
        return torch.rand(shape, generator=generator, device=device)

    return stream.drawn(draw)


def gradient_by(leaf: Tensor, losses: Tensor) -> Tensor:
    """The gradient of the sum of some losses by what their graph begins with."""
    if not losses.requires_grad:
        raise constant_loss()
    return torch.autograd.grad(losses, leaf, torch.ones_like(losses))[0]


def constant_loss() -> RuntimeError:
    """What is raised where a loss has no derivative."""
    return RuntimeError(
        "`loss` should depend on the perturbed values. Found losses without derivatives: the "
        "model's output was detached, or computed without the sites. Try to remove the `detach()`."
    )
