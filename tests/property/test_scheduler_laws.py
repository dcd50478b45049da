"""Laws of the scheduler, under any order of events: a driver and a backend in miniature."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loadmaster.scheduler.core import Scheduler
from loadmaster.scheduler.types import (
    Action,
    Admit,
    Admitted,
    Cancelled,
    Event,
    Evict,
    Finish,
    Limits,
    Refuse,
    Step,
    StepCut,
    Stepped,
    Submitted,
)

tokens = st.integers(0, 2)  # few, so that prompts share prefixes
prompts = st.lists(tokens, max_size=14).map(tuple)


class Laws(RuleBasedStateMachine):
    """Keeps its own account of cells and ends, and compares."""

    @initialize(
        n_seq_max=st.integers(1, 3),
        n_ctx=st.integers(4, 24),
        n_batch=st.integers(3, 8),
        partial=st.booleans(),
    )
    def open(self, n_seq_max: int, n_ctx: int, n_batch: int, partial: bool) -> None:
        self.limits = Limits(
            n_ctx=n_ctx,
            n_ctx_seq=n_ctx,
            n_seq_max=n_seq_max,
            n_batch=n_batch,
            n_ubatch=min(4, n_batch),
            partial_removal=partial,
        )
        self.core = Scheduler(self.limits)
        self.cells: dict[int, list[int]] = {slot: [] for slot in range(n_seq_max)}
        self.step: Step | None = None
        self.submitted: dict[str, Submitted] = {}
        self.ended: dict[str, str] = {}
        self.admitted: list[str] = []
        self.now = 0.0

    def give(self, event: Event) -> None:
        events = [event]
        while events:
            self.now += 1
            for action in self.core.on_event(events.pop(0), self.now):
                events += self.do(action)

    def do(self, action: Action) -> list[Event]:
        match action:
            case Admit():
                del self.cells[action.slot][action.n_keep :]
                prompt = self.submitted[action.request_id].prompt
                assert tuple(self.cells[action.slot]) == prompt[: action.n_keep]
                self.admitted.append(action.request_id)
                return [Admitted(slot=action.slot, n_kept=action.n_keep)]
            case Evict():
                self.cells[action.slot].clear()
            case Step():
                assert self.step is None
                self.step = action
            case Finish() | Refuse():
                assert action.request_id not in self.ended
                how = action.finish_reason if isinstance(action, Finish) else "refused"
                self.ended[action.request_id] = how
        return []

    @rule(prompt=prompts, max_tokens=st.none() | st.integers(1, 10))
    def submit(self, prompt: tuple[int, ...], max_tokens: int | None) -> None:
        name = f"r{len(self.submitted)}"
        self.submitted[name] = Submitted(request_id=name, prompt=prompt, max_tokens=max_tokens)
        self.give(self.submitted[name])

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.submitted)))
        before = self.ended.get(name)
        self.give(Cancelled(request_id=name))
        assert before is None or self.ended[name] == before

    @precondition(lambda self: self.step is not None)
    @rule(token=tokens, stop=st.booleans(), n_run=st.integers(1, 9))
    def run_step(self, token: int, stop: bool, n_run: int) -> None:
        assert self.step is not None
        step, self.step = self.step, None
        assert 0 < sum(len(part.tokens) for part in step.work) <= self.limits.n_batch
        for part in step.work:
            assert part.position == len(self.cells[part.seq_id])
            self.cells[part.seq_id] += part.tokens
        sampled = {part.seq_id: token for part in step.work if part.sample}
        run = [token + 1] * (min(n_run, step.repeat) - 1)  # what a lone sequence went on with
        if run:
            (slot,) = sampled
            self.cells[slot] += [token, *run[:-1]]
        stopped = set(list(sampled)[:1]) if stop else ()
        self.give(Stepped(tokens=sampled, stopped=stopped, run=run))

    @precondition(lambda self: self.step is not None)
    @rule()
    def withdraw_step(self) -> None:
        self.step = None
        self.give(StepCut(begun=False))

    @invariant()
    def cells_stay_within_n_ctx(self) -> None:
        if hasattr(self, "core"):
            assert self.core.reserved_cells <= self.limits.n_ctx
            assert sum(map(len, self.cells.values())) <= self.limits.n_ctx

    @invariant()
    def accounts_agree(self) -> None:
        if hasattr(self, "core"):
            for slot, cells in self.cells.items():
                assert self.core.cells(slot) == tuple(cells)

    @invariant()
    def first_come_first_served(self) -> None:
        if hasattr(self, "core"):
            assert self.admitted == sorted(self.admitted, key=lambda name: int(name[1:]))

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for _ in range(10_000):
            if self.step is None:
                break
            self.run_step(0, False, 1)
        assert self.ended.keys() == self.submitted.keys()
        assert self.core.idle
        assert self.core.reserved_cells == 0


TestLaws = Laws.TestCase
