"""Functions and modules of `torch.compile` run as they were written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside this block nothing is compiled: what was compiled knows nothing of tangents."""
    if "torch._dynamo" not in sys.modules:  # then nobody has used it, and it takes long to import
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
