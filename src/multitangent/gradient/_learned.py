"""What a source has learned: a state of tensors that a step replaces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from multitangent.gradient._step import Step
from multitangent.tangents import TangentSource


def learn(source: TangentSource, result: Step) -> None:
    """Update a source after a step."""
    if result.learned is not None:
        source.load_state_dict(result.learned)
    elif (observation := result.observation) is not None:
        source.update(observation)


def learned_state(source: TangentSource, result: Step) -> Mapping[str, Any]:
    """The state of a source after it was updated."""
    learn(source, result)
    return source.state_dict()


def kind_of_step(source: TangentSource, step: int) -> tuple[Any, ...]:
    """What a source and all that it is made of need of a step; steps of one kind agree in it.

    What the source needs as a whole does not tell: one part may learn where another does not.
    """
    return source.needs(step), *(kind_of_step(part, step) for part in source.sources)


@contextmanager
def unchanged_on_error(source: TangentSource) -> Iterator[None]:
    """Give a source its state back if this block fails."""
    before = source.state_dict()
    try:
        yield
    except BaseException:
        source.load_state_dict(before)
        raise


@contextmanager
def with_state(source: TangentSource, state: Mapping[str, Any]) -> Iterator[None]:
    """Give a source another state inside this block, and its own state back after it."""
    before = source.state_dict()
    try:
        source.load_state_dict(state)
        yield
    finally:
        source.load_state_dict(before)


def has_tensors_only(state: Mapping[str, Any]) -> bool:
    """Whether a state consists of tensors only, apart from ``None``."""
    return all(leaf is None or isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(state))


def structure(state: Mapping[str, Any]) -> Any:
    """The part that two states share if they differ only in their numbers."""
    if not state:
        return None
    leaves, tree = pytree.tree_flatten(state)
    kinds = [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in leaves]
    return tuple(kinds), str(tree)
