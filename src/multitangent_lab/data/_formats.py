"""The two published file formats, from bytes to uint8 tensors.

The bytes have passed their checksum, so nothing is left to check here.
"""

import gzip
import struct

import torch
from torch import Tensor


def parse_idx(content: bytes) -> Tensor:
    """Returns a gzipped IDX file of bytes as a uint8 tensor of the shape in its header.

    The header is two zeros, the type (8: unsigned byte), the number of axes, and the length of
    each axis as a big-endian 32-bit integer.
    """
    raw = bytearray(gzip.decompress(content))
    axes = raw[3]
    shape = struct.unpack_from(f">{axes}I", raw, offset=4)
    return torch.frombuffer(raw, dtype=torch.uint8, offset=4 + 4 * axes).reshape(shape)


def parse_cifar(content: bytes) -> tuple[Tensor, Tensor]:
    """Returns the images `[N, 3, 32, 32]` and labels `[N]` of a CIFAR-10 file, both uint8.

    A record is one label byte, then the red, green and blue planes, each row by row.
    """
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, 1 + 3 * 32 * 32)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]
