"""What the scheduler says about cells, done by the backend, and its answers."""

from loadmaster.engine.stream import Stream
from loadmaster.engine.types import Backend
from loadmaster.errors import EngineRefusedError
from loadmaster.scheduler.types import Admit, Admitted, Copy, Evict, Lost, Parked, Preempt, Shelve


class Sequences:
    """The cells and samplers of a backend's sequences."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._n_parked = 0

    def admit(self, action: Admit, stream: Stream) -> Admitted:
        """Give a request its leading cells and its sampler."""
        kept = self._leading_cells(action)
        if action.restore:
            kept = self._restore(action, stream, kept)
        if stream.sampler is None:
            sampling = stream.request.sampling
            recent = stream.request.prompt if sampling.penalized else ()
            self._backend.start_sequence(action.seq_id, sampling, recent, stream.rules)
        else:
            self._backend.move_sampler(stream.sampler, action.seq_id)
        stream.sampler = action.seq_id
        return Admitted(seq_id=action.seq_id, n_kept=kept)

    def _leading_cells(self, action: Admit) -> int:
        """Its own or those of another sequence; how many it has."""
        if action.source is None:
            kept = self._backend.remove(action.seq_id, action.n_keep)
        else:
            kept = self._backend.share(action.source, action.seq_id, action.n_keep)
        return action.n_keep if kept else 0

    def _restore(self, action: Admit, stream: Stream, kept: int) -> int:
        state, stream.state = stream.state, None
        if state is None or kept != action.n_keep:
            return kept
        try:
            self._backend.restore_state(action.seq_id, state, kept)
        except EngineRefusedError:  # no cells for it, by the engine's own account
            self._backend.remove(action.seq_id, 0)
            return 0
        return stream.state_end

    def preempt(self, action: Preempt, stream: Stream) -> Parked:
        """Take the cells away; the sampler stays as it is, under a number that no sequence has."""
        stream.state = self._backend.take_state(action.seq_id, action.start, action.limit_bytes)
        stream.state_end = action.end
        self._n_parked += 1
        stream.sampler = -self._n_parked
        self._backend.move_sampler(action.seq_id, stream.sampler)
        return Parked(request_id=action.request_id, state_bytes=len(stream.state or b""))

    def evict(self, action: Evict) -> Lost | None:
        kept = self._backend.remove(action.seq_id, action.n_keep)
        return None if kept or not action.n_keep else Lost(seq_id=action.seq_id)

    def copy(self, action: Copy) -> Lost | None:
        copied = self._backend.share(action.source, action.to, action.n)
        return None if copied else Lost(seq_id=action.to)

    def shelve(self, action: Shelve) -> Lost | None:
        moved = self._backend.share(action.seq_id, action.to, action.n)
        self._backend.remove(action.seq_id, 0)
        return None if moved else Lost(seq_id=action.to)
