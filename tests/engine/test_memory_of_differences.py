"""What finite differences hold in memory: counted in bytes, not measured."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multitangent import Activations, Normal, Weights
from multitangent.engine import FiniteDifferences, ForwardMode
from multitangent.objective import Objective
from multitangent.tangents import Stream, Tangents

WIDTH, LAYERS = 512, 6
ONE = WIDTH * WIDTH * 4  # bytes of the weights of a layer


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors hold at once which were made inside of this block."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.live = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.note(value.untyped_storage())
        return out

    def note(self, storage):
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.live or size == 0:
            return
        self.live.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.live.discard(key)
        self.now -= size


def network():
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)]
    return nn.Sequential(*layers)


def most_bytes(engine, perturb, num_tangents, *, store, batch=16):
    """Of a step without the gradients themselves, and of a run of the model."""
    model = network()
    x, y = torch.randn(batch, WIDTH), torch.randn(batch, WIDTH)
    objective = Objective(model, nn.MSELoss())
    whole, stream = objective.batch(x, y), Stream(0, 0)
    with torch.no_grad(), LiveBytes() as inference:
        nn.functional.mse_loss(model(x), y)
    with LiveBytes() as found:
        tangents = Tangents(Normal(num_tangents), stream, store=store)
        engine(perturb.bind(objective)(whole, stream, tangents), tangents)
        if perturb == Weights():
            tangents.gram()
    return found.most, inference.most


@pytest.mark.parametrize("num_tangents", [1, 6])
def test_redrawn_tangents_of_weights_take_the_memory_of_inference(num_tangents):
    """Beside it: a layer's weights and one tangent of it, then all in both precisions for G."""
    engine = FiniteDifferences(None, 16)
    found, inference = most_bytes(engine, Weights(), num_tangents, store=False)
    of_gram = num_tangents * ONE * 3
    assert found <= inference + max(3.2 * ONE, of_gram + 0.2 * ONE)
    stored, _ = most_bytes(engine, Weights(), num_tangents, store=True)
    assert stored >= num_tangents * LAYERS * ONE


def test_the_number_of_tangents_does_not_matter_where_blocks_are_large(monkeypatch):
    monkeypatch.setattr("multitangent.tangents._rows_block._LARGE", WIDTH * WIDTH)
    engine = FiniteDifferences(None, 16)
    one, many = (most_bytes(engine, Weights(), k, store=False)[0] for k in (2, 12))
    assert many <= one + 0.1 * ONE


def test_no_graph_is_kept_for_the_weights():
    """A graph would hold the activations of all layers."""
    engine = FiniteDifferences(None, 2048)
    found, inference = most_bytes(engine, Weights(), 2, store=False, batch=2048)
    of_layer = 2048 * WIDTH * 4
    assert inference <= LAYERS * ONE + 5 * of_layer
    assert found <= inference + of_layer + 6.1 * ONE


def test_layers_that_run_again_keep_no_graph_for_activations():
    sizes = [
        most_bytes(FiniteDifferences(None, 2048), Activations(recompute=recompute), k, store=False,
                   batch=2048)[0]
        for recompute, k in ((True, 1), (True, 4), (False, 1))
    ]  # fmt: skip
    assert sizes[1] <= 1.01 * sizes[0] < sizes[2]
    forward, _ = most_bytes(ForwardMode(2048), Activations(share="sample"), 4, store=True,
                            batch=2048)  # fmt: skip
    assert sizes[1] < forward / 2


def test_small_blocks_that_are_redrawn_are_not_all_joined():
    """Their Gram matrix is taken a few blocks at a time: 60 blocks of 64 KiB in less than 2 MiB."""
    tangents = Tangents(Normal(1), Stream(0, 0), store=False)
    for name in range(60):
        tangents.add(str(name), torch.zeros(2**14))
    with LiveBytes() as found:
        gram = tangents.gram()
    assert found.most < 2**21 < 60 * 2**16
    stored = Tangents(Normal(1), Stream(0, 0))
    for name in range(60):
        stored.add(str(name), torch.zeros(2**14))
    torch.testing.assert_close(gram, stored.gram())
