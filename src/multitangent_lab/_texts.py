"""The text that a language model is trained on, as bytes: a file, or Python's standard library."""

from __future__ import annotations

import sys
import sysconfig
from hashlib import sha256
from pathlib import Path

from multitangent_lab._errors import DataError

_LIMIT = 2_000_000  # bytes of the standard library


def read_text(path: Path | None) -> bytes:
    """Returns the content of a file, by default the modules of the standard library.

    Those are the `.py` files in the folder of the standard library, in the order of their names,
    as many as fit two million bytes: the same for one version of Python.

    Raises:
        DataError: The file can not be read.
    """
    if path is None:
        return _standard_library()
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise DataError(
            f"`data_file` should be a file that can be read. Found '{path}': {error.strerror}. Try "
            "another, or without, for Python's standard library."
        ) from error


def text_hash(path: Path | None) -> str:
    """Returns the SHA-256 checksum of `read_text(path)`, in hexadecimal digits."""
    return sha256(read_text(path)).hexdigest()


def _standard_library() -> bytes:
    folder = Path(sysconfig.get_paths()["stdlib"])
    content = b""
    for path in sorted(folder.glob("*.py")):
        if path.stem in sys.stdlib_module_names:  # no files that depend on the machine
            module = path.read_bytes()
            if len(content) + len(module) > _LIMIT:
                break
            content += module
    if not content:
        raise DataError(
            "`data_file` should be given where Python's standard library has no source files. "
            f"Found none in '{folder}'. Try --data-file with any text."
        )
    return content
