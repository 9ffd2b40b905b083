"""How fast a run trains."""

import time


class Speed:
    """Rates since the last call of `rates` or `restart`."""

    def __init__(self, *, step: int, total_steps: int, batch_size: int) -> None:
        self.total_steps, self.batch_size = total_steps, batch_size
        self.restart(step)

    def wait(self, seconds: float) -> None:
        """Counts seconds that were spent waiting for data."""
        self._waited += seconds

    def rates(self, step: int) -> dict[str, float]:
        """images_per_second, data_wait (share of time), eta_seconds; empty if no step was timed."""
        if step == self._step:
            return {}
        elapsed = max(time.monotonic() - self._start, 1e-9)
        steps = step - self._step
        rates = {
            "images_per_second": steps * self.batch_size / elapsed,
            "data_wait": min(self._waited / elapsed, 1.0),
            "eta_seconds": (self.total_steps - step) * elapsed / steps,
        }
        self.restart(step)
        return rates

    def restart(self, step: int) -> None:
        """Starts the clock again after a step, and after anything that is not training."""
        self._step, self._start, self._waited = step, time.monotonic(), 0.0
