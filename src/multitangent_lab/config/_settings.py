"""What a run and a comparison of runs have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Suppress

from multitangent_lab.config._checks import check_fields

# The smallest value of every whole number.
AT_LEAST = dict.fromkeys(
    (
        "width", "hidden_layers", "num_tangents", "images", "batch_size", "epochs", "patience",
        "context", "embedding", "heads", "estimates", "evaluate_every",
        "learn_every",
    ),
    1,
) | {"seed": 0, "blocks": 2}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run and a comparison of runs have in common."""

    dataset: Literal["digits", "mnist", "fashion-mnist", "cifar10", "text"] = "digits"
    """Data set; digits needs neither files nor a network, nor does text."""
    data_dir: Path | None = None
    """Folder of the data; by default $MULTITANGENT_DATA, else the user's cache folder."""
    model: str = "fc"
    """fc, resnet18, vit: the paper's networks, fully connected, residual, vision transformer; gpt:
    a causal transformer for text; or your own model, package.module:factory."""
    width: int = 256
    """Width of the hidden layers of fc."""
    hidden_layers: Suppress[int] = 2
    """How many hidden layers fc has, two in the paper."""
    data_file: Path | None = None
    """The file of text; by default the source of Python's own standard library."""
    level: Literal["character", "byte"] = "character"
    """What a token of text is: a character of UTF-8, or a byte of any file."""
    data: str | None = None
    """In place of --dataset: your own data set, package.module:factory."""
    context: Suppress[int] = 64
    """T, how many tokens of text are a sample."""
    embedding: Suppress[int] = 128
    """Width of a token in gpt."""
    blocks: Suppress[int] = 4
    """How many blocks gpt has."""
    heads: Suppress[int] = 4
    """Heads of attention in every block of gpt."""
    num_tangents: int | None = None
    """K, the number of tangents per step; by default 16, and 8 with guesses among them."""
    tangents: Literal["normal", "rademacher", "sphere", "orthogonal", "low-rank"] = "normal"
    """How tangents are drawn; low-rank, products of two vectors: of weights only."""
    perturb: Literal["activations", "weights"] = "activations"
    """What tangents are directions of."""
    sites: Suppress[tuple[str, ...] | None] = None
    """The names of the modules whose outputs are perturbed; by default the parts of the paper's
    networks, and the blocks of other models."""
    share: Suppress[Literal["batch", "sample"] | None] = None
    """Whether the samples of a batch share their random tangents (activations only); by default
    they do, as in the paper, except beside guesses."""
    output: Suppress[Literal["perturbed", "exact"] | None] = None
    """Whether the logits are perturbed too, as in the paper and by default, or use the loss's own
    derivative, as by default beside guesses (activations only)."""
    credit: Literal["sample", "token"] = "sample"
    """Which losses are measured (activations only): the loss of every sample, or of every token of
    a text, credited to the positions up to it. The latter needs a model that is causal in time."""
    discount: Suppress[float] = 1.0
    """With --credit token: the factor, from 0 to 1, by which a loss counts less for each position
    before its own."""
    learn_every: Suppress[int | None] = None
    """m: guesses learn from random tangents in every step at first, and in the end in every m-th,
    and the other steps use the guesses only; by default 16 for fc, and 1 for other models."""
    gain: Suppress[float | Literal["auto"]] = "auto"
    """Beside guesses: the share of what they miss that the random tangents bring back."""
    images: Suppress[int | None] = None
    """How many training images, or other samples, to use, and a quarter as many to validate; by
    default all."""
    recalibrate: Suppress[bool] = False
    """Whether batch normalisation takes its statistics anew before every validation; always beside
    guesses."""
    simulated: Suppress[bool] = False
    """Whether directional derivatives are computed from backpropagation, to study large K."""
    differences: Suppress[bool] = False
    """Whether directional derivatives are finite differences of losses, two runs for a tangent."""
    optimizer: str | None = None
    """Any optimizer of torch.optim, by name; by default SGD for the paper's networks, else
    AdamW."""
    batch_size: int = 64
    """Samples per step."""
    epochs: int = 200
    """Epochs at most."""
    patience: Suppress[int] = 10
    """Epochs without a better validation loss after which to stop."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and the tangents."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: on the GPU if there is one."""
    run_dir: Path | None = None
    """Folder for what is produced; by default below runs/, named after the configuration."""
    text_hash: Suppress[str | None] = None
    """SHA-256 checksum of the text, filled in."""
    code_hash: Suppress[str | None] = None
    """Stands for the files of your own model and data, filled in."""

    def __post_init__(self) -> None:
        check_fields(self, AT_LEAST)

    @property
    def data_name(self) -> str:
        """What the data are called, in the name of a folder or a title."""
        return self.data.replace(":", ".") if self.data else self.dataset

    @property
    def loss_unit(self) -> str:
        """What losses are measured in, if it is known."""
        return f"nats per {self.level}" if self.dataset == "text" else ""


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """What a run and a comparison have in common, and a search has not."""

    until_loss: Suppress[float | None] = None
    """Stop when the validation loss is at most this."""
    evaluate_every: Suppress[int | None] = None
    """Steps between two validations, in addition to one at the end of every epoch. The time of
    training does not include validations."""
