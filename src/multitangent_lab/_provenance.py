"""Where a figure comes from."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import multitangent


def provenance() -> dict[str, Any]:
    """Command, versions and machine of a run, with the GPU if this process has used one.

    Examples:
        >>> sorted(provenance())[:3]
        ['command', 'gpu', 'multitangent']
    """
    return {
        "command": _command(),
        "multitangent": multitangent.__version__,
        "revision": _revision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "gpu": _gpu(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _gpu() -> str | None:
    used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_device_name() if used else None


def _command() -> str:
    """How the process was called, but for where things are on this machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    if spec and spec.name.startswith("multitangent_lab.cli"):
        program = "multitangent"
    return " ".join([program, *map(_without_places, sys.argv[1:])])


def _without_places(word: str) -> str:
    """An argument as it was given; of a path that leads elsewhere only the last part.

    Examples:
        >>> [_without_places(word) for word in ("--out=/home/x/lr=0.1", "../data", "a/b", "--lr=3")]
        ['--out=lr=0.1', 'data', 'a/b', '--lr=3']
    """
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    return f"{option}{equals}{path.name if path.is_absolute() or '..' in path.parts else value}"


@cache
def _revision() -> str | None:
    """Of the checkout that this file is part of, if it is."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or sys.platform
