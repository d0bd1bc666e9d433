"""Learning rates to start from."""

from collections.abc import Mapping
from math import log, sqrt
from typing import TypeVar

from multitangent_lab.config._gradient_names import WITH_GUESSES

_Value = TypeVar("_Value")

# {gradient: {width: {num_tangents: learning rate}}}, all for SGD without momentum, batch size 64.
_Table = Mapping[str, Mapping[int, Mapping[int, float]]]

# Learning rates published with the paper, arXiv:2410.17764, rounded; activity perturbation.
# Fully-connected networks on MNIST:
_PUBLISHED: _Table = {
    "backpropagation": {
        256: {1: 0.02605},
        1024: {1: 0.03337},
        4096: {1: 0.03867},
    },
    "mean": {
        256: {1: 0.000559, 2: 0.0008478, 4: 0.0008195, 16: 0.001429},
        1024: {1: 0.0001572, 2: 0.0002176, 4: 0.0007909, 16: 0.00269},
        4096: {1: 7.06e-05, 2: 0.000129, 4: 0.0001768, 16: 0.0004977},
    },
    "projection": {
        256: {2: 0.2114, 4: 0.1208, 16: 0.04232},
        1024: {2: 0.2311, 4: 0.2002, 16: 0.127},
        4096: {2: 0.4633, 4: 0.3536, 16: 0.2517},
    },
}

# The deep networks, batch size 128 on CIFAR-10: {model: {data set: {gradient: {K: rate}}}}.
_DEEP: Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]] = {
    "resnet18": {
        "mnist": {
            "backpropagation": {1: 0.1},
            "mean": {1: 7.06e-05, 2: 0.0002835, 4: 0.0002096, 16: 0.0004328},
            "projection": {2: 0.5083, 4: 0.5083, 16: 0.1215},
        },
        "cifar10": {
            "backpropagation": {1: 0.1},
            "mean": {1: 0.0003376, 2: 0.0007161, 4: 0.001292, 16: 0.002517},
            "projection": {2: 0.4864, 4: 0.4864, 16: 0.4864},
        },
    },
    "vit": {
        "mnist": {
            "backpropagation": {1: 0.1},
            "mean": {1: 2.067e-05, 2: 3.392e-05, 4: 3.577e-05, 16: 7.06e-05},
            "projection": {2: 0.4864, 4: 0.4864, 16: 0.4864},
        },
        "cifar10": {
            "backpropagation": {1: 0.1},
            "mean": {1: 4.993e-05, 2: 6.605e-05, 4: 7.56e-05, 16: 0.0001935},
            "projection": {2: 1.0, 4: 1.0, 16: 0.4864},
        },
    },
}

# Digits has 18 batches per epoch against MNIST's 782 and wants larger steps. Searched in factors
# of two for the lowest validation loss within 60 epochs, two seeds, with a margin to divergence.
_DIGITS: _Table = {
    "backpropagation": {64: {1: 0.2}},
    "mean": {
        64: {1: 0.006, 16: 0.04},
        256: {1: 0.003, 4: 0.008, 16: 0.02},
        1024: {1: 0.001, 4: 0.004, 16: 0.01},
    },
    "projection": {
        64: {16: 0.4},
        256: {4: 0.8, 16: 0.8},
        1024: {4: 0.8, 16: 1.6},
    },
}

# Finite differences along one tangent of n weights, in proportion to 1 / sqrt(n). On digits 30
# epochs go down steadily with 0.004 at width 64 (n = 8970; 0.008 diverges) and 0.002 at width 256.
_MEZO = 0.38
_INPUTS = {"digits": 64, "cifar10": 3072}  # elsewhere 784
_WEIGHTS_OF_DEEP = 1e7  # about


def default_learning_rate(
    dataset: str, gradient: str, num_tangents: int, model: str = "fc", width: int = 256
) -> float:
    """Returns a learning rate for SGD: that of the nearest width and number of tangents known.

    Nearest on a logarithmic scale. A single tangent is the mean of one; the sum of K tangents
    is K times their mean, so its learning rate is a K-th of the mean's. For the fully-connected
    network digits has rates of its own. All other data sets use those published for MNIST, and
    where there are some for CIFAR-10.

    Args:
        dataset: The name of the data set.
        gradient: Its name; those with guesses have the rates of backpropagation, and that of mezo
            falls with the root of the number of weights, for two hidden layers.
        num_tangents: K; without effect for backpropagation.
        model: `"fc"`, `"resnet18"` or `"vit"`.
        width: The width of the hidden layers of `"fc"`.

    Examples:
        >>> default_learning_rate("mnist", "projection", num_tangents=20, width=200)
        0.04232
        >>> default_learning_rate("mnist", "sum", num_tangents=16) * 16
        0.001429
    """
    if gradient == "sum":
        return default_learning_rate(dataset, "mean", num_tangents, model, width) / num_tangents
    if gradient == "single":
        return default_learning_rate(dataset, "mean", 1, model, width)
    if gradient == "mezo":
        weights = (_INPUTS.get(dataset, 784) + width + 10) * width
        return _MEZO / sqrt(_WEIGHTS_OF_DEEP if model in _DEEP else weights)
    if gradient in WITH_GUESSES or gradient == "residual":  # as long as the true gradient
        return default_learning_rate(dataset, "backpropagation", 1, model, width)
    if model in _DEEP:
        rates = _DEEP[model]["cifar10" if dataset == "cifar10" else "mnist"][gradient]
    else:
        rates = _nearest((_DIGITS if dataset == "digits" else _PUBLISHED)[gradient], width)
    return _nearest(rates, num_tangents)


def _nearest(table: Mapping[int, _Value], key: int) -> _Value:
    return table[min(table, key=lambda known: abs(log(known / key)))]
