"""Figure 3: how well forward gradients approximate the gradient (Section IV-A)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, lgamma, sqrt
from pathlib import Path

import torch
from matplotlib.figure import Figure
from pandas import DataFrame, concat
from torch import Tensor

from multitangent.aggregation import Mean, Projection, Sum
from multitangent.engine import ForwardMode
from multitangent.gradient import Problem, combine, step
from multitangent.objective import Batch
from multitangent.perturbation import Argument
from multitangent.tangents import Normal, Normalized, Stream
from multitangent_lab._looks import finish
from multitangent_lab.experiments._experiment import Claim, Context, Experiment
from multitangent_lab.experiments._store import Cell, Row

# What is drawn: label, colour and style by name. The names follow the paper's: V are normal
# tangents, W the same at unit length.
_LOOKS = {
    "single": (r"$g_v$", "#999999", ":"),
    "sum V": (r"$g_V^+$", "#D55E00", "-"),
    "mean V": (r"$\overline{g_V}$", "#E69F00", "--"),
    "sum W": (r"$g_W^+$", "#0072B2", "-."),
    "mean W": (r"$\overline{g_W}$", "#56B4E9", (0, (1, 1))),
    "projection": (r"$P_U$", "#000000", "-"),
}
_MEMORY = 2**23  # numbers that may be held at once


@dataclass(frozen=True)
class Approximation(Cell):
    """All gradients for one number of tangents."""

    dimension: int
    num_tangents: int
    seeds: int


def cells(quick: bool, simulated: bool) -> list[Approximation]:
    """One cell for each K: 1000 seeds as in the paper, and more where lengths scatter widely.

    The squared length of the mean has the relative standard deviation
    ``(2K + n) sqrt(2K) / (K (K + n))``, nearly; the standard error is to be 0.25 % at most.
    """
    n, most, least, error = (16, 64, 100, 0.025) if quick else (64, 1024, 1000, 0.0025)
    powers = [2**i for i in range(most.bit_length())]
    between = [3 * 2**i for i in range(most.bit_length() - 2)]
    found = []
    for k in sorted(powers + between):
        scatter = (2 * k + n) * sqrt(2 * k) / (k * (k + n))
        found.append(Approximation(n, k, max(least, ceil((scatter / error) ** 2))))
    return found


def run(cell: Approximation, context: Context) -> list[Row]:
    """Mean cosine and norm ratio of every gradient, with standard errors."""
    parts = [_estimates(cell, part) for part in range(-(-cell.seeds // _at_once(cell)))]
    return [
        {
            "dimension": cell.dimension,
            "num_tangents": cell.num_tangents,
            "gradient": name,
            "seeds": cell.seeds,
            **_statistics(torch.cat([part[name] for part in parts])[: cell.seeds]),
            **expected(name, cell.num_tangents, cell.dimension),
        }
        for name in parts[0]
    ]


def _at_once(cell: Approximation) -> int:
    """Seeds that fit into memory together."""
    rows = cell.num_tangents * max(cell.num_tangents, cell.dimension)
    return max(1, min(cell.seeds, _MEMORY // rows, 1000))


def _estimates(cell: Approximation, part: int) -> dict[str, Tensor]:
    """Estimates ``[S, n]`` of the gradient for some seeds, in real forward mode."""
    n, seeds = cell.dimension, range(_at_once(cell))
    normal = Normal(cell.num_tangents)
    total = Argument(lambda x: x.sum(-1), samples=seeds)
    points = torch.zeros(len(seeds), n, dtype=torch.float64)
    found = step(
        Problem(total, normal, Projection(), ForwardMode(micro_batch=1)),
        Batch(points, None, slice(0, 1), 1),
        Stream(0, part),
    )
    assert found.tangents is not None
    estimates = {"projection": found.values["x"]}
    # The other gradients are made of the same tangents and directional derivatives.
    for letter, source in (("V", normal), ("W", Normalized(normal))):
        for name, aggregator in (("sum", Sum()), ("mean", Mean())):
            combination = combine(source, aggregator, found.gram, found.combination.jvps, n)
            estimates[f"{name} {letter}"] = found.tangents.combine(combination.coefficients)["x"]
    return {name: estimates[name] for name in _LOOKS if name in estimates}


def _statistics(estimates: Tensor) -> Row:
    """Of estimates ``[S, n]`` of the gradient (1, ..., 1)."""
    lengths, root = estimates.norm(dim=1), sqrt(estimates.shape[1])
    cosines, norms = estimates.sum(1) / lengths / root, lengths / root
    found: Row = {"least_cosine": cosines.min().item()}
    for name, values in (("cosine", cosines), ("norm", norms), ("squared_norm", norms.square())):
        found[name] = values.mean().item()
        found[f"{name}_error"] = values.std().item() / sqrt(len(values))
    return found


def expected(gradient: str, num_tangents: int, dimension: int) -> Row:
    """The closed forms of the means; `None` where there is none.

    Along the gradient the K normal tangents have the components a, ``|a|^2 ~ chi^2_K``, and the
    sum of their forward gradients is ``|a|^2 u + |a| w`` times the gradient's length, where w is
    normal in the n - 1 directions orthogonal to the gradient's, u. So the squared cosine is of the
    Beta distribution with K/2 and (n - 1)/2, and independent of ``|a|^2 + |w|^2``, a chi^2 with
    n + K - 1 degrees of freedom. The projection's squared cosine, and squared norm, are of the Beta
    distribution with K/2 and (n - K)/2.
    """
    k, n = num_tangents, dimension
    if gradient == "projection":
        root = _mean_root_of_beta(k, n - k) if k < n else 1.0
        return _expected(root, root, min(k / n, 1.0))
    scale = k if gradient.startswith("sum") else 1
    if gradient.endswith("W"):  # two unit vectors: E (w.u)^2 = 1/n, E (w.u)(w'.u)(w.w') = 1/n^2
        return _expected(None, None, scale**2 * (n + k - 1) / (k * n**2))
    cosine = _mean_root_of_beta(k, n - 1)
    return _expected(cosine, scale / k * cosine * (n + k - 1), scale**2 * (n + k + 1) / k)


def _expected(cosine: float | None, norm: float | None, squared_norm: float) -> Row:
    return {
        "expected_cosine": cosine,
        "expected_norm": norm,
        "expected_squared_norm": squared_norm,
    }


def _mean_root_of_beta(a: float, b: float) -> float:
    """``E sqrt(x)`` for x of the Beta distribution with a/2 and b/2."""
    logs = lgamma((a + 1) / 2) - lgamma(a / 2) + lgamma((a + b) / 2) - lgamma((a + b + 1) / 2)
    return exp(logs)


def deviations(table: DataFrame) -> DataFrame:
    """How far means lie from their closed forms, relatively and in standard errors."""
    parts = []
    for name in ("cosine", "norm", "squared_norm"):
        known = table[table[f"expected_{name}"].notna()]
        wanted = known[f"expected_{name}"].astype(float)
        off = known[name] - wanted
        parts.append(
            known[["num_tangents", "gradient"]].assign(
                quantity=name,
                relative=(off / wanted).abs(),
                standard_errors=(off / known[f"{name}_error"].clip(lower=1e-9 * wanted)).abs(),
            )
        )
    return concat(parts, ignore_index=True)


def _within(found: DataFrame) -> bool | None:
    """Whether all deviations are below 1 % and by chance; `None` if only by chance."""
    if (found["standard_errors"] >= 4).any():
        return False
    return True if (found["relative"] < 0.01).all() else None


def draw(rows: list[Row], folder: Path) -> None:
    """Cosine and norm ratio against K, with the closed forms as dots."""
    table = DataFrame(rows)
    n = int(table["dimension"].iloc[0])
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    titles = {"cosine": "Cosine similarity", "norm": r"$\|g\| \, / \, \|\nabla f\|$"}
    for axes, (column, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, (label, colour, style) in _LOOKS.items():
            if name == "single":
                first = table[(table["num_tangents"] == 1) & (table["gradient"] == "mean V")]
                for value in first[column]:
                    axes.axhline(value, color=colour, linestyle=style, label=label)
                continue
            of = table[table["gradient"] == name]
            axes.plot(of["num_tangents"], of[column], color=colour, ls=style, label=label)
            axes.plot(of["num_tangents"], of[f"expected_{column}"], ".", ms=4, color=colour)
        axes.axvline(n, color="#999999", linewidth=0.8, linestyle="--")
        axes.set(title=title, xlabel="K, number of tangents")
        axes.set_xscale("log", base=2)
        finish(axes)
    axes.set_yscale("log")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"n = {n}; dots: closed forms")
    figure.savefig(folder / "fig3.png")


def claims(rows: list[Row]) -> list[Claim]:
    """What the paper says about Figure 3."""
    table = DataFrame(rows)
    n = int(table["dimension"].iloc[0])
    cosine = table.pivot(index="num_tangents", columns="gradient", values="cosine")
    norm = table.pivot(index="num_tangents", columns="gradient", values="norm")
    gap = cosine["projection"] - cosine["mean V"]
    widest = int(gap.index.to_numpy()[gap.argmax()])
    apart = (cosine[["sum V", "mean V", "sum W", "mean W"]].T - cosine["mean V"]).abs().max().max()
    few = norm[norm.index <= n // 4]
    between = (few["projection"] / few["sum W"] - 1).abs().max()
    above = cosine["projection"][cosine.index >= n]
    worst = deviations(table)
    return [
        Claim(
            "IV-A",
            "all cosines lie between zero and one",
            bool((table["least_cosine"] >= 0).all() and (table["cosine"] < 1 + 1e-9).all()),
            f"least of all seeds {table['least_cosine'].min():.2g}",
        ),
        Claim(
            "IV-A",
            "the cosine increases with the number of tangents",
            bool((cosine.diff().dropna() > -1e-9).all(axis=None)),
            f"mean: {cosine['mean V'].iloc[0]:.3f} for K = 1, {cosine['mean V'].iloc[-1]:.3f} for "
            f"K = {cosine.index[-1]}",
        ),
        Claim(
            "IV-A",
            "the cosine is identical for all conical combinations",
            bool(apart < 1e-6),
            "sum and mean of the same tangents are parallel; at unit length the tangents have "
            f"other weights, and the mean cosine is up to {apart:.4f} higher or lower",
        ),
        Claim(
            "IV-A",
            "the projection is exact for K >= n, the others approach one only for K >> n",
            bool((above > 1 - 1e-6).all() and cosine["mean V"].loc[n] < 0.8),
            f"at K = n: projection {cosine['projection'].loc[n]:.6f}, mean "
            f"{cosine['mean V'].loc[n]:.3f}; at K = {cosine.index[-1]}: mean "
            f"{cosine['mean V'].iloc[-1]:.3f}",
        ),
        Claim(
            "IV-A",
            "the projection is consistently better, most of all around K = n",
            bool((gap > -1e-3).all() and n / 2 <= widest <= 2 * n),
            f"largest difference {gap.max():.3f}, at K = {widest}",
        ),
        Claim(
            "IV-A",
            "the sum's length grows with K, the mean's falls and approaches the correct length",
            bool(
                norm["sum V"].is_monotonic_increasing
                and norm["mean V"].is_monotonic_decreasing
                and abs(norm["mean V"].iloc[-1] - 1) < 0.05
            ),
            f"at K = {norm.index[-1]}: sum {norm['sum V'].iloc[-1]:.1f}, mean "
            f"{norm['mean V'].iloc[-1]:.3f}",
        ),
        Claim(
            "IV-A",
            "for small K the projection's length is similar to that of the sum of unit tangents",
            bool(between < 0.2),
            f"for K <= n/4 they differ by up to {between:.1%}",
        ),
        Claim(
            None,
            "means lie within 1 % of the closed forms",
            _within(worst),
            f"largest deviation {worst['relative'].max():.2%} of {len(worst)} means, "
            f"{worst['standard_errors'].max():.1f} standard errors",
        ),
    ]


EXPERIMENT = Experiment(
    title="Figure 3: approximation quality",
    cells=cells,
    run=run,
    draw=draw,
    claims=claims,
)
