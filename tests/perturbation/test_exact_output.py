"""With an exact output the last site needs no tangents."""

import torch
from torch import nn

from multitangent import Activations, ForwardGradient, Mean
from multitangent.tangents import TangentSource

EXACT = Activations(output="exact")


class Noted(TangentSource):
    """Normal tangents, and the names of the sites for which some were drawn."""

    num_tangents = 3

    def __init__(self):
        self.names = []

    def draw(self, request):
        self.names.append(request.name)
        return request.random.normal(self.num_tangents)


class Longer(nn.Module):
    """A model that goes on behind its last site in every other run, and once more calls a site."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.more = False

    def forward(self, x):
        y = self.layers[1](self.layers[0](x).tanh())
        return self.layers[1](y.sin()) if self.more else y


def test_no_tangents_are_drawn_for_the_output_once_it_is_known():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    source = Noted()
    gradient = ForwardGradient(model, nn.CrossEntropyLoss(), source, Mean(), EXACT, verify=False)
    x, y = torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)
    gradient(x, y)
    source.names.clear()
    gradient(x, y)
    assert set(source.names) == {"0"}


def test_an_output_that_turns_out_not_to_be_the_last_has_its_tangents():
    torch.manual_seed(0)
    model = Longer().double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 4).double()

    def gradients(estimator):
        model.zero_grad()
        estimator(x, y)
        return [p.grad.clone() for p in model.parameters()]

    def made():
        return ForwardGradient(model, nn.MSELoss(), perturb=EXACT, verify=False, seed=7)

    knowing, other = made(), made()
    model.more = False
    knowing(x, y)
    model.more = True
    found = gradients(knowing)  # the second step of both
    other.step = 1
    for one, two in zip(found, gradients(other), strict=True):
        torch.testing.assert_close(one, two)
