"""The line on stderr: what becomes of it when nobody is there to read it."""

import io

from loadmaster.interfaces.cli.progress import TerminalProgress


class Gone(io.StringIO):
    """A terminal that is closed after some writes."""

    def __init__(self, n_writes: int) -> None:
        super().__init__()
        self.left = n_writes

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def test_a_terminal_that_is_gone_ends_no_work() -> None:
    for n_writes in range(4):
        terminal = Gone(n_writes)
        progress = TerminalProgress(stream=terminal)
        for fraction in (0.1, 0.5, 1.0):
            progress.redraw(f"loading {fraction}")
            progress.say("a line")
        progress.finish()
        assert terminal.left == -1  # it was not asked again
        assert not progress.is_terminal
