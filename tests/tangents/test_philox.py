"""Counter-based random numbers: published vectors, the same bits in any pieces, moments."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from multitangent.tangents import IndependentRows, Stream, _philox
from multitangent.tangents._philox import normal, philox, rademacher, uniform, words

ONES = 0xFFFFFFFF
# Of the authors' kat_vectors for philox 4x32, 10 rounds: counter, key, result.
VECTORS = [
    ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
ROWS = torch.tensor([0, 5, 2**40, 7, 2**62])


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter, key, expected):
    assert philox(torch.tensor(counter)[:, None], key).flatten().tolist() == expected
    assert philox(torch.tensor(counter)[:, None].expand(4, 9), key).unique(dim=1).shape[1] == 1


@pytest.mark.parametrize("draw", [normal, rademacher])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_are_functions_of_their_numbers(draw, dtype, monkeypatch):
    whole = draw(ROWS, 1001, 3, dtype)
    assert whole.dtype is dtype
    assert torch.equal(draw(ROWS[[2, 0]], 1001, 3, dtype), whole[[2, 0]])
    assert torch.equal(draw(ROWS, 70, 3, dtype), whole[:, :70])
    assert not torch.equal(draw(ROWS, 1001, 4, dtype), whole)
    assert len(whole.unique(dim=0)) == len(ROWS)
    for pieces in (1, 3, 64, 2**20):
        monkeypatch.setattr(_philox, "_AT_ONCE", pieces)
        assert torch.equal(draw(ROWS, 1001, 3, dtype), whole)


def test_rows_of_a_sample_belong_to_it():
    def drawn(samples, first=0, count=3):
        stream = Stream(1, 2, "philox")
        rows = IndependentRows(stream, 0, (5,), samples, first, torch.float32, torch.device("cpu"))
        return rows.normal(count)

    whole = drawn([4, 9, 2])
    assert whole.shape == (3, 3, 5)
    assert torch.equal(drawn([2, 4]), whole[:, [2, 0]])
    assert torch.equal(drawn([9], first=1, count=2), whole[1:, [1]])
    assert torch.equal(drawn(None, first=1, count=2), drawn(None)[1:])
    assert not torch.equal(drawn([0]), drawn(None))


def test_uniform_numbers():
    drawn = uniform(torch.arange(4), 2**14, 5, torch.float32)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    assert float(drawn.mean()) == pytest.approx(0.5, abs=5 * 12**-0.5 / 2**8)
    assert float(drawn.var()) == pytest.approx(1 / 12, rel=0.02)


def test_the_number_of_threads_does_not_matter():
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[1]));"
        "from multitangent.tangents._philox import words;"
        "print(int(words(torch.arange(3), 300_000, 9).long().sum()))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code, str(count)], capture_output=True, text=True, check=True
        ).stdout
        for count in (1, 2, 3, 8)
    }
    assert len(found) == 1


def test_moments_of_normal_numbers():
    drawn = normal(torch.arange(64), 2**14, 1, torch.float64)
    assert abs(float(drawn.mean())) < 5 / 2**10
    assert float(drawn.square().mean()) == pytest.approx(1, abs=0.01)
    assert float(drawn.pow(4).mean()) == pytest.approx(3, abs=0.03)
    gram = drawn @ drawn.mT / drawn.shape[1]
    assert float((gram - torch.eye(64)).abs().max()) < 6 / 2**7
    ordered = drawn.flatten().sort().values
    expected = torch.special.ndtr(ordered)
    uniform = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    assert float((expected - uniform).abs().max()) < 2 / 2**10  # Kolmogorov and Smirnov


def test_every_bit_of_a_word_is_random():
    drawn = words(torch.arange(16), 4096, 2).flatten().long() & ONES
    shares = [float((drawn >> bit & 1).double().mean()) for bit in range(32)]
    assert max(abs(share - 0.5) for share in shares) < 5 * 0.5 / 2**8
    signs = rademacher(torch.arange(16), 4096, 2, torch.float64)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert float((signs @ signs.mT / 4096 - torch.eye(16)).abs().max()) < 5 / 2**6
