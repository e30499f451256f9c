"""What a server's word is worth after it has lost its memory: receipts, which workers keep and show when they join.

A log's own bytes cannot tell that its end is missing: an older copy was put back, or a disk lost what it had written.
A receipt proves to the server that it once called a delta durable. Nobody else can make one, so nobody stops a server
by a lie; and it binds for one term, since what is lost with a site is not asked back in the next.
"""

import hmac
from hashlib import blake2b

from hetero_async.core.messages import Ack, Hello
from hetero_async.core.state import State

RECEIPT_BYTES = 16


class Receipts:
    def __init__(self, secret: bytes, state: State) -> None:
        """`secret`: at most 64 bytes, which all processes of this server have and nobody else."""
        self._secret = secret
        self._state = state

    def ack(self, worker: str, seq: int, lsn: int) -> Ack:
        return Ack(seq=seq, lsn=lsn, receipt=self._of(worker, seq))

    def lost(self, worker: str, hello: Hello) -> str:
        """What the worker can prove that our log lacks, for people; "": nothing."""
        member = self._state.members.get(worker)
        last_seq = member.last_seq if member is not None else 0
        if hello.acknowledged <= last_seq or not hmac.compare_digest(
            hello.receipt, self._of(worker, hello.acknowledged)
        ):
            return ""
        return (
            f"{worker} has our word that its delta {hello.acknowledged} is durable, and this log ends with its delta "
            f"{last_seq}: it is an older copy, or the disk lost what it had written"
        )

    def _of(self, worker: str, seq: int) -> bytes:
        said = f"{self._state.term} {seq} {worker}".encode()
        return blake2b(said, key=self._secret, digest_size=RECEIPT_BYTES, person=b"acknowledged").digest()
