"""The output side of one request: tokens in, events out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from loadmaster.engine.detokenize import TextStream
from loadmaster.engine.reported import Reported
from loadmaster.engine.types import (
    Backend,
    DoneEvent,
    GenerateRequest,
    OutputRules,
    TextEvent,
    TokenLogprob,
)
from loadmaster.scheduler.types import Finish


@dataclass(slots=True, kw_only=True)
class Stream:
    """What a request has generated, what of it was sent, and what it left while preempted."""

    request: GenerateRequest
    text: TextStream
    n_tokens: int = 0
    pending: str = ""
    sent_s: float = float("-inf")  # the first text goes out at once
    reported: Reported = field(default_factory=Reported)
    failure: str | None = None  # its schema cannot be followed any further
    sampler: int | None = None  # the sequence whose sampler it has; below 0 while preempted
    state: bytes | None = None  # while preempted, if it was worth saving
    state_end: int = 0  # how many cells it has with that state

    @property
    def rules(self) -> OutputRules:
        request = self.request
        return OutputRules(json_schema=request.json_schema, top_logprobs=request.top_logprobs)

    def feed(
        self, backend: Backend, tokens: Sequence[int], logprob: TokenLogprob | None = None
    ) -> bool:
        """Add tokens; whether the stream stops with the last one."""
        self.n_tokens += len(tokens)
        ended = not self.request.ignore_eos and backend.is_eog(tokens[-1])
        if logprob is not None and not ended:
            self.reported.add(logprob)
        raw = b"".join(map(backend.token_bytes, tokens[:-1] if ended else tokens))
        self.pending += self.text.feed(raw)
        return ended or self.text.stopped

    def take(self, now: float, *, ended: bool = False) -> TextEvent:
        """The text that waits to be sent; it counts as sent now."""
        text, self.pending, self.sent_s = self.pending, "", now
        return TextEvent(
            request_id=self.request.request_id,
            text=text,
            n_tokens=self.n_tokens,
            logprobs=self.reported.take(text, ended=ended),
        )

    def finish(self, end: Finish, now: float) -> tuple[TextEvent | None, DoneEvent]:
        """The last text, if any is left, and the end."""
        reason = end.finish_reason
        if reason != "cancelled":
            self.pending += self.text.flush()
            # What was held back may have turned out to be a stop string.
            reason = "stop" if self.text.stopped else reason
        if self.failure is not None:
            reason = "failed"
        left = self.pending or self.reported.waiting
        return self.take(now, ended=True) if left else None, DoneEvent(
            request_id=end.request_id,
            finish_reason=reason,
            n_prompt=end.n_prompt,
            n_cached=end.n_cached,
            n_generated=end.n_generated,
            prefill_s=end.prefill_s,
            decode_s=end.decode_s,
            error=self.failure,
            n_preempted=end.n_preempted,
            n_drafted=end.n_drafted,
            n_accepted=end.n_accepted,
        )
