"""The objective: how a batch runs through a model to the losses of its samples."""

from multitangent.objective._batch import Batch, arguments, shapes, whole_batch
from multitangent.objective._batch_mode import BatchMode
from multitangent.objective._batch_norm import Statistics, normalizes_batches
from multitangent.objective._objective import Evaluation, Objective, constant_loss, output_tensor
from multitangent.objective._per_sample_loss import PerSampleLoss
from multitangent.objective._preserved import SavedBuffers, preserved
from multitangent.objective._record import BatchRecord

__all__ = [
    "Batch",
    "BatchMode",
    "BatchRecord",
    "Evaluation",
    "Objective",
    "PerSampleLoss",
    "SavedBuffers",
    "Statistics",
    "arguments",
    "constant_loss",
    "normalizes_batches",
    "output_tensor",
    "preserved",
    "shapes",
    "whole_batch",
]
