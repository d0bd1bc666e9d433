"""Files that are never seen half written."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path`, which holds either its old content or all of the new."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
