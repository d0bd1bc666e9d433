"""The networks of the paper, a language model, and adapters."""

from multitangent_lab.models._fully_connected import fully_connected
from multitangent_lab.models._gpt import gpt
from multitangent_lab.models._low_rank_adapter import LowRankAdapter, add_low_rank_adapters
from multitangent_lab.models._named import build_model
from multitangent_lab.models._resnet import resnet18
from multitangent_lab.models._vision_transformer import vision_transformer

__all__ = [
    "LowRankAdapter",
    "add_low_rank_adapters",
    "build_model",
    "fully_connected",
    "gpt",
    "resnet18",
    "vision_transformer",
]
