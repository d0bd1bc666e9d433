"""What to reproduce, as plain values: importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from multitangent_lab._errors import ConfigError
from multitangent_lab.config._checks import check_fields

FIGURES = ("fig3", "fig4", "fig5", "fig6", "table1")
NETWORKS = ("fig6", "table1")
STUDIES = (
    "function-rates",
    "network-rates",
    "samplers",
    "guesses",
    "guesses-full",
    "running-mean",
    "adapters",
    "time-to-accuracy",
)
_WITH_QUICK = (*FIGURES, "all", "time-to-accuracy")


@dataclass(frozen=True)
class ReproduceConfig:
    """Run experiments: the paper's, compared with what it says, and studies beyond it.

    What has been run before is not run again, and what was interrupted goes on.

    Examples:
        >>> ReproduceConfig("all").figures
        ('fig3', 'fig4', 'fig5', 'fig6', 'table1')
        >>> ReproduceConfig("fig6", quick=True).folder("fig6").as_posix()
        'results/paper/fig6-quick'
        >>> ReproduceConfig("table1", epochs=2).folder("table1").as_posix()
        'results/paper/table1-after-2-epochs'
        >>> ReproduceConfig("guesses").folder("guesses").as_posix()
        'results/studies/guesses'
    """

    figure: Positional[
        Literal[
            "fig3",
            "fig4",
            "fig5",
            "fig6",
            "table1",
            "all",
            "function-rates",
            "network-rates",
            "samplers",
            "guesses",
            "guesses-full",
            "running-mean",
            "adapters",
            "time-to-accuracy",
        ]
    ] = "fig3"
    """fig3: how close gradients come, fig4: closed-form functions, fig5: tangents on a cone, fig6:
    fully-connected networks, table1: ResNet18 and the vision transformer; all: these five. Studies:
    learning rates of functions and of networks, samplers of a search, gradients with guesses in
    small and in full, running means of gradients, adapters of a language model, the time until
    backpropagation's validation loss."""
    quick: bool = False
    """A small version, for a first look: each takes a minute or two."""
    out: Path | None = None
    """Folder in which every experiment has one of its own; by default results/paper, and for
    studies results/studies."""
    budget_minutes: float | None = None
    """Time after which nothing new is begun and training stops; the same command goes on later."""
    workers: int | None = None
    """Processes that share the work; by default one per core, but a single one on a GPU, with
    --quick and for time-to-accuracy."""
    simulated: bool = False
    """Networks: directional derivatives from backpropagation, not the real forward mode."""
    epochs: int | None = None
    """Table I: train one seed of each network for at most so many epochs, as a result of its own;
    by default three seeds for up to 200 epochs, as the paper does."""
    data_dir: Path | None = None
    """Folder of the data; by default $MULTITANGENT_DATA, else the user's cache folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks are trained; auto: on the GPU if there is one."""

    def __post_init__(self) -> None:
        check_fields(self, {"workers": 1, "epochs": 1})
        if self.simulated and self.figure not in NETWORKS:
            raise ConfigError(
                f"`simulated` should go with {' or '.join(NETWORKS)}, whose networks it concerns. "
                f"Found {self.figure}. Try fig6."
            )
        if self.epochs is not None and (self.figure != "table1" or self.quick):
            found = f"{self.figure}{' and quick' if self.quick else ''}"
            raise ConfigError(
                f"`epochs` should go with table1 in full. Found {found}. Try it without."
            )
        if self.quick and self.figure not in _WITH_QUICK:
            raise ConfigError(
                f"`quick` should go with {', '.join(_WITH_QUICK)}, which have a small version. "
                f"Found {self.figure}. Try it without."
            )

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of the experiments."""
        return FIGURES if self.figure == "all" else (self.figure,)

    def folder(self, figure: str) -> Path:
        """Where the results of one experiment are."""
        kinds = [kind for kind in ("simulated", "quick") if getattr(self, kind)]
        if self.epochs is not None:
            kinds.append(f"after-{self.epochs}-epoch{'s' if self.epochs > 1 else ''}")
        home = Path("results", "studies" if figure in STUDIES else "paper")
        return (home if self.out is None else self.out) / "-".join([figure, *kinds])
