"""Which worker gives the run its initial parameters: the first that comes, for as long as it says something."""

from hetero_async.core.messages import Provide, Wait

# A worker that was asked for the initial parameters and then says nothing for so long is given up on.
PROVIDER_SILENCE_MS = 10_000


class Provider:
    def __init__(self) -> None:
        self._asked: tuple[str, int] | None = None  # who, and when it was last heard

    def answer(self, worker: str, now_ms: int) -> Provide | Wait:
        """To a worker that has come to a run which has no parameters yet."""
        provider, since_ms = self._asked or (worker, now_ms)
        if now_ms - since_ms > PROVIDER_SILENCE_MS:
            provider = worker
        if provider != worker:
            return Wait(reason=f"{provider} is sending the initial parameters")
        self._asked = (provider, now_ms)
        return Provide()
