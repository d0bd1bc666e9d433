"""The scripts in `examples/`, each run as a user runs it, and the page that shows them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models_for_tests import relative_error
from multitangent import ForwardGradient
from multitangent.tangents import Normal

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"lightning_module": "lightning", "many_processes": "torch", "peft_lora": "peft"}
ids = [path.stem for path in SCRIPTS]


def test_there_is_a_script_for_every_integration() -> None:
    assert ids == [
        "lightning_module", "many_processes", "peft_lora", "plain_loop", "trainer_subclass"
    ]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_the_loss_falls(script: Path, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS.get(script.stem, "transformers"))
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "FallbackWarning" not in done.stderr
    losses = [float(text) for text in re.findall(r"\bloss\W+(\d+\.\d+)", done.stdout)]
    assert len(losses) >= 4
    assert losses[-1] < losses[0] - 0.5
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_two_processes_print_what_one_prints() -> None:
    script = ROOT / "examples" / "many_processes.py"
    alone, shared = (
        subprocess.run(
            [sys.executable, *command, script],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        ).stdout
        for command in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])
    )
    assert alone.count("loss") == shared.count("loss") == 5
    assert alone == shared


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_the_page_shows_the_script(script: Path) -> None:
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    code = script.read_text(encoding="utf-8")
    assert f"```python\n{code}```\n" in page
    assert code.count("\n") < 60


def _trainer(kind: Any, folder: Path, **options: Any) -> Any:
    """A trainer of a small model on sentences of several lengths."""
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=5, n_positions=6, n_embd=4, n_layer=1, n_head=2, n_inner=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    ids = torch.randint(5, (14, 6))
    lengths = torch.randint(2, 7, (14, 1))
    padded = ids.where(torch.arange(6) < lengths, -100)
    data = [{"input_ids": i, "labels": y} for i, y in zip(ids, padded, strict=True)]
    arguments = tf.TrainingArguments(
        str(folder), max_steps=4, learning_rate=0.1, optim="sgd", per_device_train_batch_size=4,
        gradient_accumulation_steps=3, report_to="none", use_cpu=True, save_strategy="no",
        logging_steps=1, disable_tqdm=True, **options,
    )  # fmt: skip
    return kind(tf.GPT2LMHeadModel(config).double(), arguments, train_dataset=data)


def _trained(trainer: Any) -> tuple[list[Tensor], list[float]]:
    trainer.train()
    parameters: list[nn.Parameter] = list(trainer.model.parameters())
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return [parameter.detach() for parameter in parameters], losses


@pytest.mark.filterwarnings("ignore")  # of PyTorch and of `transformers` about their own code
def test_the_trainer_makes_the_steps_of_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many tangents as dimensions: accumulation, padding and clipping count the same."""
    tf = pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from trainer_subclass import ForwardTrainer

    expected, right_losses = _trained(_trainer(tf.Trainer, tmp_path))
    trainer = _trainer(ForwardTrainer, tmp_path)
    start = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    n = sum(parameter.numel() for parameter in start)
    trainer.gradient = ForwardGradient(
        trainer.model, trainer.sample_losses, Normal(n + 20), perturb="weights"
    )
    found, losses = _trained(trainer)
    assert relative_error(found, expected) < 1e-6  # `transformers` takes the loss in float32
    assert relative_error(start, expected) > 1e-2
    assert losses == pytest.approx(right_losses, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_refuses_a_scaled_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from trainer_subclass import ForwardTrainer

    class Scaled(ForwardTrainer):
        def create_accelerator_and_postprocess(self) -> None:  # which itself needs a GPU
            super().create_accelerator_and_postprocess()
            self.args.fp16 = True

    with pytest.raises(ValueError, match=r"no fp16\. Try bf16=True"):
        _trainer(Scaled, tmp_path)


@pytest.mark.filterwarnings("ignore")  # of Lightning about a small run
def test_a_resumed_run_of_lightning_is_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from lightning_module import ForwardModule

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(12, 4), torch.randint(3, (12,)))

    def trained(epochs: int, checkpoint: Path | None = None) -> tuple[Any, Tensor]:
        torch.manual_seed(1)
        module = ForwardModule(nn.Linear(4, 3), nn.CrossEntropyLoss())
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(data, batch_size=4)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        return trainer, module.model.weight.detach()

    # One tangent alone: a step depends on what was drawn.
    monkeypatch.setattr("lightning_module.Normal", lambda count: Normal(1))
    first, _ = trained(1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    _, resumed = trained(2, tmp_path / "first.ckpt")
    _, uninterrupted = trained(2)
    assert torch.equal(resumed, uninterrupted)
