"""Whether the model answers: after a failed forward, a trial decides."""

from __future__ import annotations

import asyncio

from .engine import ClosedError, QueueFullError
from .load import Service
from .rows import Completion, Embedding, Row

TRIAL_SECONDS = 5.0


class Health:
    """Tells whether forwards run.

    A request can make its own forward fail, and a broken device makes all fail. So after a failure with no success since,
    a forward of the base model on one token decides; it also notices when the model runs again and nobody asks.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._trial: Row | None = None

    async def is_good(self) -> bool:
        if not self.service.metrics.failing:
            return True
        if self._trial is None or self._trial.done.done():
            self._trial = self._make_row()
            try:
                self.service.engine.submit([self._trial])
            except (QueueFullError, ClosedError):
                return False
        try:
            async with asyncio.timeout(TRIAL_SECONDS):
                await asyncio.shield(asyncio.wrap_future(self._trial.done))
        except Exception:
            return False
        return True

    def _make_row(self) -> Row:
        if not self.service.engine.causal:
            return Embedding(None, [0])
        return Completion(None, [0], decode=lambda ids: "", on_text=lambda text: None, max_tokens=1, temperature=0)
