"""The forward gradient of a model: a gradient without a backward pass."""

from __future__ import annotations

from multitangent.engine import Engine, ForwardMode, Trial
from multitangent.gradient._estimator import GradientEstimator


class ForwardGradient(GradientEstimator):
    """Takes the place of ``loss(model(x), y)`` and ``.backward()``.

    K tangents V are pushed through the model together with the data, their directional derivatives
    ``d = V grad f`` combined into coefficients c, and the forward gradient ``g = V^T c`` is added
    to ``.grad`` of every trainable parameter (Section III).

    Args:
        model: Any module. Which parameters are trainable may change between steps; its modules
            are those it had when the gradient was made.
        loss: A callable ``(output, target) -> [B]``, of which the mean is taken, or a loss module
            of PyTorch, whose ``reduction`` is honoured. With weights one number for the batch is
            enough, such as ``lambda output, target: output.loss``.
        tangents: Where the K tangents come from, ``Normal(16)`` by default; sources add up.
        aggregator: How the directional derivatives are combined, ``Projection()`` by default.
        perturb: ``"activations"``, ``"weights"``, or a configured `Activations` or `Weights`;
            or a perturbation of your own, see `multitangent.perturbation.Perturbation`.
        seed: All random numbers are a function of it and of the count of the steps.
        micro_batch: How many samples are pushed at a time. The result does not depend on it: where
            the parts of a batch give other losses than the whole, there is a warning, and the batch
            is not split. The size of the batch is the first axis of the first input; all tensors
            among inputs and target with a first axis of that size are split. ``"auto"`` finds a
            size by a run of two samples, once for every kind of batch.
        store_tangents: Whether tangents are kept, or drawn again wherever they are needed: less
            memory, above all for ``"weights"``, for more random numbers.
        tangent_dtype: The type in which tangents are carried, such as ``torch.bfloat16``, by
            default that of the perturbed values. Directional derivatives then have its precision.
        compile: Whether the step is compiled, for every shape of batch, mode of the modules and
            choice of the arguments above. What the model keeps in other attributes than parameters
            and buffers is compiled in. Where the compiled step differs from the plain one, or can
            not be made, there is a warning, and the plain one goes on.
        verify: ``"first"`` compares a few samples' derivatives with those of backpropagation at the
            first step of every kind of batch (its shapes and types, the modes of the modules),
            ``"always"`` at every step, ``False`` never. What differs is a `VerificationError`.
            Parts of a batch have to give the losses of the whole, which runs once more for this,
            without tangents. ``"parts"`` runs two parts as one in place of the whole, and compares
            nothing else. It is for weights, if the whole does not fit into memory. It does not
            notice what only larger batches do.
        mesh: Processes that share every step, along axes ``"tangent"`` (each pushes some of the
            tangents), ``"data"`` (each has samples of its own), or both. Every rank then makes the
            same calls. ``None`` is a single process.
        generator: Where random tangents and the masks of dropout come from. ``"torch"`` are
            PyTorch's generators, whose numbers differ between kinds of devices. ``"philox"`` is a
            counter-based generator (Philox 4x32-10, Salmon et al. 2011), whose bits are the same on
            every device; normal numbers are one of 65536 levels.

    Raises:
        ValueError: If an argument is out of range, or the model does not fit the perturbation.

    Examples:
        >>> import torch
        >>> from multitangent import ForwardGradient, Normal, Projection
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> gradient = ForwardGradient(model, nn.CrossEntropyLoss(), Normal(5), Projection())
        >>> x, y = torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> value = gradient(x, y)
        >>> bool(value == torch.nn.functional.cross_entropy(model(x), y).detach())
        True

        Five independent tangents span all n = 5 activations, so this gradient is exact:

        >>> estimate = model[0].weight.grad.clone()
        >>> model.zero_grad()
        >>> torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> torch.allclose(estimate, model[0].weight.grad, atol=1e-5)
        True
    """

    def _engine(self, trial: Trial) -> Engine:
        return ForwardMode(trial.micro_batch, trial.is_plain, trial.compares)
