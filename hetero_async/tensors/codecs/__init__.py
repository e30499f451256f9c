"""The codecs by name; a new one is one file and one line here."""

import torch

from hetero_async.errors import PeerError
from hetero_async.formats.compression import compress, decompress
from hetero_async.tensors.codecs.bf16 import Bf16
from hetero_async.tensors.codecs.codec import BLOCK, Codec
from hetero_async.tensors.codecs.e3m0 import E3m0
from hetero_async.tensors.codecs.fp32 import Fp32
from hetero_async.tensors.codecs.int4 import Int4
from hetero_async.tensors.codecs.int8 import Int8
from hetero_async.tensors.codecs.top_k import TopK
from hetero_async.tensors.codecs.two_bit import TwoBit
from hetero_async.tensors.devices import beside, to_host

__all__ = [
    "BLOCK", "CODECS", "WITH_FEEDBACK", "Codec", "codec_named", "decode_payload", "encode_payload", "open_payload",
]  # fmt: skip

# So coarse that what they leave out must go into the next push (tensors/feedback.py).
WITH_FEEDBACK = frozenset({"2bit", "topk"})

CODECS: dict[str, Codec] = {codec.name: codec for codec in (Fp32(), Bf16(), Int8(), Int4(), E3m0(), TwoBit(), TopK())}


def codec_named(name: str) -> Codec:
    """Raises PeerError: codecs are named by the other side, which may run other software."""
    codec = CODECS.get(name)
    if codec is None:
        raise PeerError(f"unknown codec {name:.40}; known: {', '.join(CODECS)}")
    return codec


def encode_payload(name: str, flat: torch.Tensor) -> bytes:
    """Flat fp32, any device → what travels and is logged. Raises PeerError for an unknown codec."""
    with beside(flat.device):
        raw = to_host(codec_named(name).encode(flat))
    return compress(raw.numpy().data)


def open_payload(name: str, payload: bytes | bytearray | memoryview, numel: int) -> torch.Tensor:
    """Decompressed, not decoded: uint8 on the CPU. Raises PeerError for anything but a whole payload of that size."""
    raw = decompress(payload, codec_named(name).raw_bytes(numel))
    opened = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    CODECS[name].check(opened, numel)
    return opened


def decode_payload(name: str, payload: bytes | bytearray | memoryview, numel: int) -> torch.Tensor:
    """Flat fp32 on the CPU. Raises PeerError like `open_payload`."""
    raw = open_payload(name, payload, numel)  # first: only a payload that is really so long may size memory
    flat = torch.empty(numel)
    CODECS[name].decode(raw, numel, 0, flat)
    return flat
