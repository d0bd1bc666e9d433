"""The optimizers of torch, by name."""

from collections.abc import Iterable
from difflib import get_close_matches

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from multitangent_lab._errors import ConfigError

# The first evaluates the loss more than once per step, the second needs sparse gradients.
_UNSUITABLE = ("LBFGS", "SparseAdam")


def optimizer_names() -> tuple[str, ...]:
    """Returns the names of the optimizers of `torch.optim` that a run can use.

    Examples:
        >>> {"SGD", "AdamW"} <= set(optimizer_names()), "LBFGS" in optimizer_names()
        (True, False)
    """
    return tuple(
        name
        for name, value in sorted(vars(torch.optim).items())
        if isinstance(value, type)
        and issubclass(value, Optimizer)
        and value is not Optimizer
        and name not in _UNSUITABLE
    )


def build_optimizer(
    name: str, parameters: Iterable[Parameter], learning_rate: float | None
) -> Optimizer:
    """Returns the optimizer of `torch.optim` called `name`.

    Args:
        name: One of `optimizer_names()`.
        parameters: What to optimize.
        learning_rate: By default torch's own for this optimizer.

    Raises:
        ConfigError: There is no such optimizer, or it refuses these parameters.
    """
    names = optimizer_names()
    if name not in names:
        folded = {choice.lower(): choice for choice in names}
        close = get_close_matches(name.lower(), folded, n=1)
        raise ConfigError(
            f"`optimizer` should be one of {', '.join(names)}. Found {name!r}. "
            f"Try {folded[close[0]] if close else 'SGD'!r}."
        )
    options = {} if learning_rate is None else {"lr": learning_rate}
    try:
        optimizer: Optimizer = getattr(torch.optim, name)(parameters, **options)
    except ValueError as error:
        raise ConfigError(
            f"`optimizer` should suit all parameters of the model. Found {name!r}, which says: "
            f"{error}. Try 'SGD'."
        ) from error
    return optimizer
