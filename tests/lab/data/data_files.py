"""A web server of our own, and small files in the published formats."""

import gzip
import hashlib
import struct
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from torch import Tensor


class Server:
    """A web server on this machine: `files[path]` is what it has, `asked` what it was asked for.

    It sends the first `share` of a file; whether it first says how long the whole is
    (`announce`) decides if the client can see by itself that the connection broke.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.share = 1.0
        self.announce = True
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.path)
                content = server.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                if server.announce:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: int(server.share * len(content))])

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}/"


def md5(content: bytes) -> str:
    return "md5:" + hashlib.md5(content).hexdigest()


def idx(values: Tensor) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return gzip.compress(header + values.numpy().tobytes())


def idx_files(train: Tensor, test: Tensor) -> dict[str, bytes]:
    """The four files of MNIST, from uint8 images `[N, H, W]` of the classes 0, 1, ..., 9, 0, ..."""
    files = {}
    for part, images in (("train", train), ("t10k", test)):
        labels = (torch.arange(len(images)) % 10).to(torch.uint8)
        files[f"{part}-images-idx3-ubyte.gz"] = idx(images)
        files[f"{part}-labels-idx1-ubyte.gz"] = idx(labels)
    return files
