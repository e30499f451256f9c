"""What a run begins with: parameters and buffers as the first worker uploads them, and as all workers probe them."""

from dataclasses import replace

import safetensors.torch
import torch
from safetensors import SafetensorError

from hetero_async.core.publish_note import PublishNote
from hetero_async.errors import PeerError
from hetero_async.tensors.buffers import Specs, Values, initial_values, with_buffers
from hetero_async.tensors.codecs import decode_payload, encode_payload
from hetero_async.tensors.replica import hash_of, write_object
from hetero_async.tensors.schema import Schema

NOTHING_PUBLISHED = PublishNote(number=0, version=0, codec="fp32", merged=(), shadow_hash=b"")
# What all workers probe their layers on must be the same for all of a run, not exact.
COARSE = "int4"


def initial(schema: bytes, parameters: memoryview, constants: memoryview) -> tuple[torch.Tensor, Values]:
    """What a run begins with: parameters and buffers. Raises PeerError."""
    found = Schema.from_bytes(schema)
    flat = decode_payload("fp32", parameters, found.numel)
    return flat, initial_values(found.buffers, constants_of(bytes(constants)))


def constants_of(packed: bytes) -> dict[str, torch.Tensor]:
    """The model's buffers. Raises PeerError, for a dtype that this torch does not know as well."""
    try:
        return safetensors.torch.load(packed)
    except (SafetensorError, KeyError) as error:
        raise PeerError(f"not a model's buffers: {error}") from error


def coarse(specs: Specs, theta: torch.Tensor, buffers: Values) -> bytes:
    """The object that workers fetch to probe their models with; the buffers as they are."""
    coded = encode_payload(COARSE, theta)
    shadow_hash = hash_of(decode_payload(COARSE, coded, theta.numel()), buffers)
    note = replace(NOTHING_PUBLISHED, codec=COARSE, shadow_hash=shadow_hash)
    return write_object(note, with_buffers(specs, coded, dict(enumerate(buffers))))
