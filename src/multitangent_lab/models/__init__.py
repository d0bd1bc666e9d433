"""The networks of the paper, a language model, and adapters."""

from multitangent_lab.models._fully_connected import fully_connected
from multitangent_lab.models._gpt import gpt
from multitangent_lab.models._lora import LoRALinear, add_lora
from multitangent_lab.models._named import build_model
from multitangent_lab.models._resnet import resnet18
from multitangent_lab.models._vision_transformer import vision_transformer

__all__ = [
    "LoRALinear",
    "add_lora",
    "build_model",
    "fully_connected",
    "gpt",
    "resnet18",
    "vision_transformer",
]
