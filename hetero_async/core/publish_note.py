"""What stands before the coded bytes of a publish or snapshot, within its payload; tensors/ writes and reads it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishNote:
    """What stands before the coded bytes of a publish or snapshot object.

    `shadow_hash` is the xxh3_128 of the shadow (flat little-endian fp32) after it; `merged` says per worker up to
    which seq its deltas are contained.
    """

    number: int
    version: int
    codec: str
    merged: tuple[tuple[str, int], ...]
    shadow_hash: bytes
