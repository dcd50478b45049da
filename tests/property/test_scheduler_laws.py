"""Laws of the scheduler, under any order of events, on engines of every kind."""

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loadmaster.scheduler.types import Finish, StepCosts
from tests.scheduler_parts import N_TOKENS, Run, Speech, echoing_token, limits, next_token

tokens = st.integers(1, N_TOKENS - 1)
beginnings = st.sampled_from([(), (1,), (1, 2, 3, 4, 1, 2, 3, 4), (1, 2, 3, 4, 4, 4)])
prompts = st.tuples(beginnings, st.lists(tokens, max_size=8).map(tuple)).map(lambda p: p[0] + p[1])
CHEAP = ((1, 1.0), (16, 1.001))  # a draft always pays
KINDS: dict[str, dict[str, Any]] = {
    "unified": {},
    "all ids run": {"n_seq_ids": None, "partial_state": False},
    "apart": {"n_seq_ids": None, "partial_state": False, "shared_prefix": False},
    "recurrent": {
        "n_seq_ids": None, "partial_state": False, "partial_removal": False, "shared_at_end": True,
        "n_draft": 0,
    },
    "windowed": {"n_seq_ids": None, "partial_state": False, "shared_at_end": True},
    "answers sit out": {"answers_beside": 1},
}  # fmt: skip


class Laws(RuleBasedStateMachine):
    """The scheduler on a pool that counts its cells itself."""

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        n_seq_max=st.sampled_from([1, 2, 3, 5, 9]),
        n_ctx=st.integers(8, 60),
        n_batch=st.integers(5, 12),
        state_bytes=st.sampled_from([0, 80, 10_000]),
        n_draft=st.sampled_from([0, 0, 1, 3, 7]),
        draft_model=st.booleans(),
        speech=st.sampled_from([next_token, echoing_token]),
    )
    def open(
        self, kind: str, n_seq_max: int, n_ctx: int, n_batch: int, state_bytes: int, n_draft: int,
        draft_model: bool, speech: Speech,
    ) -> None:  # fmt: skip
        kept: dict[str, Any] = {"n_seq_ids": n_seq_max + 4, "n_draft": n_draft}
        changes = kept | KINDS[kind]
        self.run = Run(
            limits(
                n_ctx=n_ctx, n_seq_max=n_seq_max, n_batch=n_batch, n_ubatch=min(4, n_batch),
                state_bytes=state_bytes, n_draft_step=n_batch,
                draft_model=draft_model, **changes,
            ),
            on_step=lambda _: None,
            speech=speech,
        )  # fmt: skip
        self.most_out = 3 if "answers_beside" in changes else 0
        self.n_out = 0
        self.run.give(StepCosts(costs=CHEAP))

    @rule(
        prompt=prompts,
        max_tokens=st.none() | st.integers(1, 30),
        priority=st.sampled_from([0, 1, 1]),
        scope=st.sampled_from(["", "", "b"]),
        stops=st.booleans(),
    )
    def submit(
        self, prompt: tuple[int, ...], max_tokens: int | None, priority: int, scope: str,
        stops: bool,
    ) -> None:  # fmt: skip
        name = f"r{len(self.run.requests)}"
        self.run.submit(name, prompt, max_tokens, priority=priority, scope=scope, stops=stops)

    @precondition(lambda self: self.run.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.run.requests)))
        before = self.run.ends.get(name)
        self.run.cancel(name)
        if before is None and self.run.step is None:
            end = self.run.ends[name]
            assert isinstance(end, Finish)
            assert end.finish_reason == "cancelled"
        else:
            assert self.run.ends.get(name) == before

    @rule(n_steps=st.integers(1, 12), n_run=st.integers(1, 9))
    def run_steps(self, n_steps: int, n_run: int) -> None:
        for _ in range(n_steps):
            first = self.first()
            before = len(self.run.streams[first]) if first else 0
            decodes = first is not None and self.decodes(first)
            fed = self.run.core.stats().n_prefilled_tokens
            if not self.run.run_step(n_run):
                assert self.run.core.idle
                break
            # whoever is first gets on with every step, or answers in every fourth beside prompts
            assert first is not None
            answered = len(self.run.streams[first]) > before
            assert answered or self.run.core.stats().n_prefilled_tokens > fed
            self.n_out = self.n_out + 1 if decodes and not answered else 0
            assert self.n_out <= self.most_out

    def decodes(self, name: str) -> bool:
        """All of its tokens are in cells but the last, which it sampled."""
        seq_id = next((seq for seq, found in self.run.by_seq.items() if found == name), None)
        known = len(self.run.requests[name].prompt) + len(self.run.streams[name])
        fed = 0 if seq_id is None else len(self.run.pool.tokens(seq_id))
        return bool(self.run.streams[name]) and fed == known - 1

    def first(self) -> str | None:
        left = [name for name in self.run.requests if name not in self.run.ends]
        return min(left, key=lambda n: (self.run.requests[n].priority, int(n[1:])), default=None)

    @rule(no_room=st.booleans())
    def withdraw_step(self, no_room: bool) -> None:
        self.run.cut_step(no_room=no_room)
        self.n_out = 0

    @invariant()
    def accounts_agree(self) -> None:
        if hasattr(self, "run"):
            self.run.check()

    def teardown(self) -> None:
        if hasattr(self, "run"):
            self.run.finish(n_run=3)
            self.run.check()
            self.run.check_streams()
            self.run.check_drafts()
            assert self.run.core.stats().n_cells_running == 0
            assert self.run.states == {}


TestLaws = Laws.TestCase
