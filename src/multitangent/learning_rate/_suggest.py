"""Learning rates in closed form, from one that suits the true gradient."""

from __future__ import annotations

from math import inf

from multitangent.aggregation import Aggregator, Projection


def suggest(
    reference_rate: float,
    *,
    num_tangents: int,
    dimension: int,
    aggregator: Aggregator | None = None,
    headroom: float = 1.0,
) -> float:
    """The learning rate of a forward gradient, from one that suits the true gradient.

    With ``E[g] = a grad f`` and ``E|g|^2 = s |grad f|^2`` for K normal tangents in n dimensions, a
    step at rate r changes a smooth loss of curvature L by ``(-a r + s L r^2 / 2) |grad f|^2``. The
    best rate is ``a/s`` times that of the true gradient: K/(n + K + 1) for `Mean`, 1 for
    `Projection`, whose decrease per step is K/n of the full one. This is what limits the rate
    where the reference is as large as the curvature allows. Where the reference is smaller than
    that, by a factor `headroom`, the rate may be larger, up to ``1/a`` times the reference, at
    which the expected step is the true gradient's: n/K for `Projection`, 1 for `Mean`.

    ``rate = reference_rate * min(headroom * a/s, 1/a)``

    Args:
        reference_rate: A learning rate that suits the true gradient.
        num_tangents: K.
        dimension: n, the number of perturbed scalars: of one sample's activations, or of all
            weights.
        aggregator: How directional derivatives are combined, ``Projection()`` by default.
        headroom: The largest rate at which the true gradient still descends well, over the
            reference; ``math.inf`` if noise alone limits the rate.

    Returns:
        The learning rate.

    Raises:
        ValueError: If a number is not positive, or `headroom` below 1.
        NotImplementedError: If the moments of `aggregator` have no closed form.

    Examples:
        >>> from multitangent import Mean, Projection
        >>> suggest(0.5, num_tangents=16, dimension=64, aggregator=Mean())
        0.09876543209876543
        >>> suggest(0.5, num_tangents=16, dimension=64, aggregator=Projection())
        0.5
        >>> suggest(0.025, num_tangents=16, dimension=64, headroom=float("inf"))
        0.1
    """
    arguments = {
        "reference_rate": (reference_rate, 0 < reference_rate < inf, "a positive number"),
        "num_tangents": (num_tangents, num_tangents >= 1, "at least 1"),
        "dimension": (dimension, dimension >= 1, "at least 1"),
        "headroom": (headroom, headroom >= 1, "at least 1"),
    }
    for name, (value, fits, wanted) in arguments.items():
        if not fits:
            raise ValueError(f"`{name}` should be {wanted}. Found {value!r}.")
    aggregator = Projection() if aggregator is None else aggregator
    alignment = aggregator.expected_alignment(num_tangents, dimension)
    square = aggregator.expected_squared_norm(num_tangents, dimension)
    return reference_rate * min(headroom * alignment / square, 1 / alignment)
