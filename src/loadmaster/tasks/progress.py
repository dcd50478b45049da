"""What a task tells whoever watches it. Tasks never print."""

from typing import Protocol


class Progress(Protocol):
    """A watcher: a terminal, a log, or nobody."""

    def say(self, line: str) -> None:
        """One line about a decision: a second plan, a fallback."""

    def loading(self, fraction: float) -> None:
        """Loading has come this far, 0 to 1."""

    def prefill(self, n_done: int, n_prompt: int) -> None:
        """A prompt has been read this far."""

    def finish(self) -> None:
        """What was shown as under way has ended, well or not; may be called again."""


class Silent:
    """Nobody watches."""

    def say(self, line: str) -> None:
        """Drop it."""

    def loading(self, fraction: float) -> None:
        """Drop it."""

    def prefill(self, n_done: int, n_prompt: int) -> None:
        """Drop it."""

    def finish(self) -> None:
        """Nothing was shown."""


class TransferProgress(Protocol):
    """A watcher of a download."""

    def say(self, line: str) -> None:
        """One line about a decision."""

    def fetching(self, label: str, done_bytes: int, total_bytes: int | None) -> None:
        """So much of a file is here; the total may be unknown."""

    def verifying(self, label: str, done_bytes: int, total_bytes: int) -> None:
        """So much of a file has been read for its digest."""
