"""Which samples are held out of a set."""

import torch
from torch import Tensor


def holdout(labels: Tensor, size: int, seed: int) -> Tensor:
    """Returns a mask `[N]` of `size` samples, drawn at random with every class in its proportion.

    The samples are shuffled and put in the order of their classes; of this row, every
    `N / size`-th is held out, so each class gives its share to within one sample.

    Args:
        labels: Classes, `[N]`, on the CPU.
        size: How many samples to hold out, 0 to N.
        seed: The only source of randomness.
    """
    total = len(labels)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    order = torch.randperm(total, generator=generator, device="cpu")
    order = order[labels[order].argsort(stable=True)]
    mask = torch.zeros(total, dtype=torch.bool, device="cpu")
    mask[order[torch.arange(size, device="cpu") * total // size]] = True
    return mask
