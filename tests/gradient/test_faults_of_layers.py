"""Layers and losses of ordinary models whose gradients were wrong or not to be had, by kind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from models_for_tests import Model, gradients, relative_error
from multitangent import (
    Activations,
    ForwardGradient,
    Projection,
    SimulatedGradient,
)
from multitangent.dual import DualTensor
from multitangent.tangents import Normal, StandardBasis

DTYPE = torch.float64
BOTH = pytest.mark.parametrize("perturb", ["activations", "weights"])
SIZES = pytest.mark.parametrize("micro_batch", ["auto", 2])


def data(*shape, seed=1):
    return torch.randn(shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def linear(*sizes):
    return seeded(lambda: nn.Linear(*sizes, dtype=DTYPE))


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def assert_right(model, x, y, loss=None, perturb="weights", n=300, **options):
    """The gradient of as many tangents as there are dimensions is that of backpropagation."""
    loss = nn.MSELoss() if loss is None else loss
    loss(model(*x) if isinstance(x, tuple) else model(x), y).mean().backward()
    expected = dense_gradients(model)
    gradient = ForwardGradient(model, loss, StandardBasis(n), Projection(), perturb, **options)
    gradient(x, y)
    assert relative_error(dense_gradients(model), expected) <= 1e-9


def dense_gradients(model):
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.to_dense()
    return gradients(model)


KINKS = {
    "prelu": nn.PReLU,
    "prelu by channel": lambda: nn.PReLU(6),
    "relu6": nn.ReLU6,
    "hardtanh": lambda: nn.Hardtanh(0.0, 1.0),
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "softshrink": nn.Softshrink,
    "threshold": lambda: nn.Threshold(0.0, 0.0),
    "celu": nn.CELU,
}


@BOTH
@pytest.mark.parametrize("name", KINKS)
def test_kinks_behind_relu(name, perturb):
    layers = linear(3, 6), nn.ReLU(), KINKS[name]().double(), linear(6, 2)
    assert_right(nn.Sequential(*layers), data(5, 3), data(5, 2), perturb=perturb)


def scattered(h, reduce):
    index = torch.tensor([[0, 1, 1, 0]]).expand(len(h), 4)
    return torch.relu(h).new_zeros(len(h), 2).scatter_reduce(1, index, torch.relu(h), reduce)


TIES = {
    "product": lambda h: scattered(h, "prod"),
    "product without": lambda h: h.new_zeros(len(h), 1).scatter_reduce(
        1, torch.zeros(len(h), 4, dtype=torch.long), h, "prod", include_self=False
    ).expand(-1, 2),
    "largest": lambda h: scattered(h, "amax"),
    "smallest": lambda h: scattered(h, "amin"),
    "mean": lambda h: scattered(h, "mean"),
    "amax": lambda h: torch.relu(h).amax(1, keepdim=True).expand(-1, 2),
    "fmax": lambda h: torch.fmax(torch.relu(h), h.new_zeros(()))[:, :2],
    "power": lambda h: torch.relu(h)[:, :2] ** torch.relu(h)[:, 2:],
    "angle": lambda h: torch.atan2(torch.relu(h[:, :2]), torch.relu(h[:, 2:]) + (h[:, 2:] <= 0)),
    "unit length": lambda h: F.normalize(torch.relu(h) * (h > 1))[:, :2],
    "spread": lambda h: (torch.relu(h) * (h > 2)).std(1, keepdim=True).expand(-1, 2),
    "distances": lambda h: torch.cdist(torch.relu(h).view(-1, 2, 2), torch.zeros(1, 2, 2).double())
    .flatten(1)[:, :2],
    "powers": lambda h: F.lp_pool1d(torch.relu(h), 2.0, 2),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", TIES)
def test_ties_and_zeros(name, perturb):
    model = Model(lambda m, x: m.parts[1](TIES[name](m.parts[0](x))), linear(3, 4), linear(2, 2))
    assert_right(model, data(5, 3), data(5, 2), perturb=perturb, micro_batch=2)


SHAPES = {
    "column and row": (lambda m, x: m.parts[0](x), (6, 1), (6,)),
    "row and column": (lambda m, x: m.parts[0](x)[:, 0], (6, 1), (6, 1)),
    "square and row": (lambda m, x: m.parts[0](x), (6, 6), (6,)),
}


@BOTH
@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("loss", [nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss])
@pytest.mark.parametrize("name", SHAPES)
def test_a_loss_that_compares_all_samples_is_refused(name, loss, perturb):
    function, (_, width), shape = SHAPES[name]
    model = Model(function, linear(3, width))
    gradient = ForwardGradient(model, loss(), Normal(2), perturb=perturb)
    with pytest.raises(ValueError, match="compare the output with a target of the same shape"):
        gradient(data(6, 3), data(*shape))


@BOTH
@SIZES
@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("shape", [(4,), (1,), (), (6, 1), (1, 4)])
def test_a_target_that_all_samples_share_is_none_of_them(shape, perturb, micro_batch):
    model, x = Model(lambda m, x: m.parts[0](x), linear(3, 4)), data(6, 3)
    assert_right(model, x, data(*shape), perturb=perturb, micro_batch=micro_batch)


WORDS = torch.tensor([[0, 1], [1, 1], [2, 3], [4, 0]])
TABLES = {
    "padding": lambda: nn.Embedding(5, 3, padding_idx=1, dtype=DTYPE),
    "longest row": lambda: nn.Embedding(5, 3, max_norm=1.0, dtype=DTYPE),
    "sparse": lambda: nn.Embedding(5, 3, sparse=True, dtype=DTYPE),
    "bags": lambda: nn.EmbeddingBag(5, 3, dtype=DTYPE),
    "bags of largest": lambda: nn.EmbeddingBag(5, 3, mode="max", padding_idx=1, dtype=DTYPE),
    "sparse bags": lambda: nn.EmbeddingBag(5, 3, mode="sum", sparse=True, dtype=DTYPE),
}


def embedded(make):
    layers = seeded(make), linear(3, 2)
    return Model(lambda m, i: m.parts[1](m.parts[0](i).view(len(i), -1, 3).mean(1)), *layers)


@BOTH
@pytest.mark.parametrize("name", TABLES)
def test_embeddings(name, perturb):
    assert_right(embedded(TABLES[name]), WORDS, data(4, 2), perturb=perturb, micro_batch=4)


@BOTH
def test_the_gradient_of_a_sparse_embedding_can_be_used(perturb):
    model = Model(lambda m, i: m.parts[1](m.parts[0](i).mean(1)), TABLES["sparse"](), linear(3, 2))
    gradient = ForwardGradient(model, nn.MSELoss(), Normal(2), perturb=perturb, micro_batch=2)
    before = model.parts[0].weight.detach().clone()
    for _ in range(2):  # and added to what is there
        gradient(WORDS, data(4, 2))
    assert model.parts[0].weight.grad.is_sparse == (perturb == "activations")
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not torch.equal(model.parts[0].weight, before)


FREQUENCIES = {
    "embedding": lambda: nn.Embedding(5, 3, scale_grad_by_freq=True, dtype=DTYPE),
    "bags": lambda: nn.EmbeddingBag(5, 3, scale_grad_by_freq=True, dtype=DTYPE),
}


@pytest.mark.parametrize("name", FREQUENCIES)
def test_gradients_divided_by_frequencies(name):
    model = embedded(FREQUENCIES[name])
    assert_right(copy.deepcopy(model), WORDS, data(4, 2), perturb="activations", micro_batch=4)
    gradient = ForwardGradient(model, nn.MSELoss(), Normal(2), perturb="weights")
    with pytest.raises(NotImplementedError, match=r"scale_grad_by_freq.*perturb='activations'"):
        gradient(WORDS, data(4, 2))


ADJACENCY = (data(5, 5) > 0.3).double()
PRODUCTS = {
    "@": lambda s, h: s @ h,
    "mm": lambda s, h: s.mm(h),
    "matmul": torch.matmul,
    "sparse mm": torch.sparse.mm,
    "sparse addmm": lambda s, h: torch.sparse.addmm(h, s, h, alpha=0.5),
    "vectors": lambda s, h: torch.stack([torch.mv(s, column) for column in h.unbind(1)], 1),
    "from the right": lambda s, h: (h.t() @ s).t(),
}


@pytest.mark.filterwarnings("ignore:Sparse C")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_a_sparse_matrix(name, layout):
    graph, product = ADJACENCY.to_sparse(layout=layout), PRODUCTS[name]
    layers = linear(3, 3), linear(3, 2)
    model = Model(lambda m, x: m.parts[1](product(graph, m.parts[0](x)).tanh()), *layers)
    assert_right(model, data(5, 3), data(5, 2), micro_batch=5)
    layers = linear(3, 5), linear(5, 2)
    model = Model(lambda m, x: m.parts[1](product(graph, m.parts[0](x).t()).t().tanh()), *layers)
    assert_right(model, data(6, 3), data(6, 2), perturb="activations", micro_batch=4)


def test_sparse_tensors_that_would_carry_tangents_are_refused():
    x = DualTensor(data(3, 3), data(2, 3, 3))
    with pytest.raises(NotImplementedError, match=r"to_sparse should return a dense tensor"):
        x.to_sparse()
    with pytest.raises(NotImplementedError, match=r"mul should return a dense tensor"):
        x * data(3, 3).to_sparse()
    with pytest.raises(ValueError, match=r"`reduce` of torch\.sparse\.mm should be 'sum'"):
        torch.sparse.mm(data(3, 3).to_sparse_csr(), x, "amax")


class Packed(nn.Module):
    """A recurrent layer over sequences of unequal lengths."""

    def __init__(self, kind):
        super().__init__()
        self.layer = seeded(lambda: kind(3, 4, batch_first=True, dtype=DTYPE))

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, state = self.layer(packed)
        padded, _ = pad_packed_sequence(output, True, padding_value=0.1, total_length=6)
        state = state[0] if isinstance(state, tuple) else state
        return state[-1] + padded.sum(1)


@SIZES
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "perturb", [Activations(sites=["parts.0", "parts.1", "parts.2"]), "weights"]
)
def test_packed_sequences(perturb, kind, micro_batch):
    def forward(m, x, lengths):
        return m.parts[2](m.parts[1](m.parts[0](x).tanh(), lengths))

    model = Model(forward, linear(3, 3), Packed(kind), linear(4, 2))
    x = data(5, 6, 3), torch.tensor([3, 6, 2, 6, 1])
    padded = torch.zeros(5, 2, dtype=DTYPE)
    assert_right(model, x, padded, perturb=perturb, micro_batch=micro_batch)


def connectionist(output, target):
    lengths = torch.full((len(output),), output.shape[1])
    return F.ctc_loss(
        output.log_softmax(-1).transpose(0, 1),
        target,
        lengths,
        target.ne(0).sum(1),
        reduction="none",
    )


def triplet(output, target):
    return F.triplet_margin_loss(output, target, target.flip(1), reduction="none")


RELATED = torch.tensor([[0, 2, -1, 0], [1, -1, 0, 0], [2, 3, 1, -1], [3, -1, 0, 0]])
CLASSES = torch.tensor([0, 3, 1, 1])
LOSSES = {
    "connectionist": (connectionist, torch.tensor([[1, 2], [1, 1], [3, 0], [2, 3]])),
    "triplets": (triplet, data(4, 4)),
    "margins": (nn.MultiMarginLoss(), CLASSES),
    "square margins": (nn.MultiMarginLoss(p=2, reduction="sum"), CLASSES),
    "margins of sets": (nn.MultiLabelMarginLoss(), RELATED),
    "soft margins of sets": (nn.MultiLabelSoftMarginLoss(), (RELATED > 0).double()),
    "soft margin": (nn.SoftMarginLoss(), data(4, 4).sign()),
    "hinge": (nn.HingeEmbeddingLoss(), data(4, 4).sign()),
    "huber": (nn.HuberLoss(), data(4, 4)),
    "absolute": (nn.L1Loss(), torch.zeros(4, 4, dtype=DTYPE)),
    "poisson": (nn.PoissonNLLLoss(), data(4, 4).abs()),
    "cosine": (lambda o, y: 1 - F.cosine_similarity(o, y), data(4, 4)),
}  # fmt: skip


@BOTH
@SIZES
@pytest.mark.parametrize("name", LOSSES)
def test_losses_without_a_forward_formula(name, perturb, micro_batch):
    loss, target = LOSSES[name]
    if name == "connectionist":
        model = Model(
            lambda m, x: m.parts[1](torch.relu(m.parts[0](x))), linear(3, 5), linear(5, 4)
        )
        x = data(4, 6, 3)
    else:
        model, x = nn.Sequential(linear(3, 5), nn.ReLU(), linear(5, 4), nn.ReLU()), data(4, 3)
    assert_right(model, x, target, loss, perturb, 500, micro_batch=micro_batch)


SAMPLED = {
    "grid sample": lambda h, x: F.grid_sample(
        x.view(-1, 1, 3, 3), h.view(-1, 1, 2, 2).tanh(), align_corners=False
    ).flatten(1),
    "weight norm": lambda h, x: torch._weight_norm(h, h[:, :1], 0)[:, :2],
    "pairs": lambda h, x: torch.stack([F.pdist(row.view(2, 2)) for row in h]).expand(-1, 2),
    "meshgrid": lambda h, x: torch.stack(torch.meshgrid(h[:, 0], h[:, 1], indexing="ij"))
    .diagonal(dim1=1, dim2=2).t(),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", SAMPLED)
def test_functions_without_a_forward_formula(name, perturb):
    model = Model(
        lambda m, x: m.parts[1](SAMPLED[name](m.parts[0](x), x)), linear(9, 4), linear(2, 2)
    )
    assert_right(model, data(5, 9), data(5, 2), perturb=perturb)


def test_a_function_without_a_derivative_is_named():
    x = DualTensor(data(3).float(), data(2, 3).float())
    match = r"_fake_quantize_learnable_per_tensor_affine should have a backward .* Try functions"
    with pytest.raises(NotImplementedError, match=match):
        torch._fake_quantize_learnable_per_tensor_affine(
            x, torch.tensor([0.1]), torch.zeros(1), -10, 10, 1.0
        )


def test_a_function_without_a_second_derivative_has_no_curvature():
    model = nn.Sequential(linear(3, 2))
    gradient = ForwardGradient(model, nn.HuberLoss(), Normal(2), perturb="weights")
    gradient(data(4, 3), data(4, 2))
    direction = {name: p.grad for name, p in model.named_parameters()}
    assert torch.isfinite(gradient.along(direction, curvature=False).slope)
    with pytest.raises(NotImplementedError, match=r"second derivatives.*curvature=False"):
        gradient.along(direction)


class NormAndActivation(nn.BatchNorm2d):
    """Batch normalisation with a forward of its own and modules inside it, as in timm."""

    def __init__(self, size):
        super().__init__(size, dtype=DTYPE)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        y = F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.2, self.eps)
        return self.act(self.drop(y))


class NormByFunction(nn.Module):
    """Batch normalisation by a function."""

    def __init__(self, size, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(size, dtype=DTYPE))
        self.register_buffer("mean", torch.zeros(size, dtype=DTYPE))
        self.register_buffer("var", torch.ones(size, dtype=DTYPE))

    def forward(self, x):
        return self.function(x, self.mean, self.var, self.weight)


NORMS = {
    "subclass": lambda: NormAndActivation(4),
    "function": lambda: NormByFunction(4, lambda x, m, v, w: F.batch_norm(x, m, v, w, None, True)),
    "by names": lambda: NormByFunction(
        4,
        lambda x, m, v, w: F.batch_norm(x, running_mean=m, running_var=v, weight=w, training=True),
    ),
    "without averages": lambda: NormByFunction(
        4, lambda x, m, v, w: F.batch_norm(x, None, None, w, training=True)
    ),
    "torch": lambda: NormByFunction(
        4, lambda x, m, v, w: torch.batch_norm(x, w, None, m, v, True, 0.1, 1e-5, False)
    ),
    "instances": lambda: NormByFunction(
        4, lambda x, m, v, w: torch.instance_norm(x, w, None, m, v, False, 0.1, 1e-5, False)
    ),
    "synchronised": lambda: nn.SyncBatchNorm(4, dtype=DTYPE),
}


@BOTH
@SIZES
@pytest.mark.parametrize("name", NORMS)
def test_batch_normalisation_by_a_subclass_or_a_function(name, perturb, micro_batch):
    if perturb == "weights" and micro_batch == 2 and name not in ("subclass", "synchronised"):
        micro_batch = 6
    layers = (
        seeded(lambda: nn.Conv2d(2, 4, 2, bias=False, dtype=DTYPE)),
        NORMS[name](),
        linear(36, 3),
    )
    model = Model(
        lambda m, x: m.parts[2](torch.tanh(m.parts[1](m.parts[0](x))).flatten(1)), *layers
    )
    oracle = copy.deepcopy(model)
    batch, options = (data(6, 2, 4, 4), data(6, 3)), (StandardBasis(400), Projection(), perturb)
    SimulatedGradient(oracle, nn.MSELoss(), *options, statistics="frozen")(*batch)
    ForwardGradient(model, nn.MSELoss(), *options, micro_batch=micro_batch)(*batch)
    assert relative_error(gradients(model), gradients(oracle)) <= 1e-9
    for buffer, expected in zip(model.buffers(), oracle.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


def test_statistics_that_a_model_asks_for_are_refused():
    def forward(m, x):
        return m.parts[0](torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0])

    gradient = ForwardGradient(Model(forward, linear(3, 2)), nn.MSELoss(), Normal(2))
    with pytest.raises(NotImplementedError, match="native_batch_norm should not be called"):
        gradient(data(4, 3), data(4, 2))
