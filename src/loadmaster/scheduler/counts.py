"""What the scheduler counts while it runs."""

from dataclasses import dataclass

from loadmaster.scheduler.cells import Cells
from loadmaster.scheduler.types import SchedulerStats


@dataclass(slots=True)
class Counts:
    """Counts since the model was opened; what is in use now is added when somebody asks."""

    n_submitted: int = 0
    n_finished: int = 0
    n_prefilled_tokens: int = 0
    n_reused_tokens: int = 0
    n_generated_tokens: int = 0
    n_steps: int = 0
    n_decode_steps: int = 0
    n_preempted: int = 0
    n_restored: int = 0
    state_bytes: int = 0
    state_peak_bytes: int = 0
    n_drafted_tokens: int = 0
    n_accepted_tokens: int = 0

    def save(self, state_bytes: int) -> None:
        self.state_bytes += state_bytes
        self.state_peak_bytes = max(self.state_peak_bytes, self.state_bytes)

    def stats(self, n_ctx: int, cells: Cells, n_running: int, n_queued: int) -> SchedulerStats:
        return SchedulerStats(
            n_cells=n_ctx,
            n_cells_used=cells.n_used,
            n_cells_running=cells.n_held,
            n_running=n_running,
            n_queued=n_queued,
            n_kept=cells.n_kept,
            n_submitted=self.n_submitted,
            n_finished=self.n_finished,
            n_prefilled_tokens=self.n_prefilled_tokens,
            n_reused_tokens=self.n_reused_tokens,
            n_generated_tokens=self.n_generated_tokens,
            n_steps=self.n_steps,
            n_decode_steps=self.n_decode_steps,
            n_preempted=self.n_preempted,
            n_restored=self.n_restored,
            state_bytes=self.state_bytes,
            state_peak_bytes=self.state_peak_bytes,
            n_drafted_tokens=self.n_drafted_tokens,
            n_accepted_tokens=self.n_accepted_tokens,
        )
