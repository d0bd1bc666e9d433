"""The objective: how a batch runs through a model to the losses of its samples."""

from multitangent.objective._batch import Batch, arguments, shapes, whole_batch
from multitangent.objective._batch_mode import BatchMode, GraphQuery
from multitangent.objective._batch_norm import Statistics, normalizes_batches
from multitangent.objective._kept_parameters import kept_parameters
from multitangent.objective._logits_loss import LogitsLoss
from multitangent.objective._objective import (
    Evaluation,
    Objective,
    constant_loss,
    gradient_by,
    output_tensor,
)
from multitangent.objective._per_sample_loss import PerSampleLoss
from multitangent.objective._randomness import RANDOM
from multitangent.objective._record import BatchRecord
from multitangent.objective._replaced import replaced_in_use
from multitangent.objective._state import Change, SavedState

__all__ = [
    "RANDOM",
    "Batch",
    "BatchMode",
    "BatchRecord",
    "Change",
    "Evaluation",
    "GraphQuery",
    "LogitsLoss",
    "Objective",
    "PerSampleLoss",
    "SavedState",
    "Statistics",
    "arguments",
    "constant_loss",
    "gradient_by",
    "kept_parameters",
    "normalizes_batches",
    "output_tensor",
    "replaced_in_use",
    "shapes",
    "whole_batch",
]
