"""Statistics of batch normalisation, taken anew before the validation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from multitangent_lab.data import Batches, first_images, load_dataset
from multitangent_lab.training import TrainConfig, _train, train
from multitangent_lab.training._statistics import recalibrate


def normalized(*_: Any, **__: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)
    )


def test_statistics_are_the_means_over_some_batches() -> None:
    torch.manual_seed(0)
    model = normalized()
    batches = Batches(load_dataset("digits").train, 32, shuffle=False, seed=0)
    recalibrate(model, batches)
    values = [model[:2](images) for images, _ in list(batches)[:20]]
    layer = model[2]
    assert isinstance(layer, nn.BatchNorm1d)
    means = torch.stack([value.mean(0) for value in values]).mean(0)
    variances = torch.stack([value.var(0) for value in values]).mean(0)
    torch.testing.assert_close(layer.running_mean, means)
    torch.testing.assert_close(layer.running_var, variances)
    assert layer.momentum == 0.1
    before = [buffer.clone() for buffer in model.buffers()]
    recalibrate(model.eval(), batches)  # statistics that are not in use are left alone
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


@pytest.mark.parametrize("recalibrated", [False, True])
def test_what_is_validated_is_what_is_saved(
    recalibrated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_train, "build_model", normalized)
    config = TrainConfig(
        gradient="backpropagation", epochs=1, batch_size=64, images=640, device="cpu",
        recalibrate=recalibrated, run_dir=tmp_path,
    )  # fmt: skip
    result = train(config)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    model = normalized()
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})
    data = first_images(load_dataset("digits"), 640)
    model.eval()
    loss = nn.functional.cross_entropy(model(data.validation.images), data.validation.labels)
    assert result.validation_loss == pytest.approx(loss.item(), rel=1e-4)
    counts = state["model.2.num_batches_tracked"]  # of the ten steps, or of the ten batches after
    assert counts == 10
    kept = state["model.2.running_mean"].clone()
    model.train()
    recalibrate(model, Batches(data.train, 64, shuffle=True, seed=0))
    close = torch.allclose(kept, model[2].running_mean, rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]
    assert close == recalibrated
