"""How an error looks at the edge: text for people, JSON for programs, and an exit code."""

from dataclasses import dataclass, field

import click

from loadmaster.errors import LoadmasterError, Number

INTERRUPTED_EXIT_CODE = 130
_OUR_FAULT_HINT = "run it again with `--debug` and report the traceback with `loadmaster doctor`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What went wrong, how much, and what to type next."""

    message: str
    exit_code: int
    code: str
    hint: str | None = None
    numbers: dict[str, Number] = field(default_factory=dict)
    details: str = ""  # a table between the message and the hint
    extra: dict[str, object] = field(default_factory=dict)  # keys beside `error` in JSON

    def to_text(self) -> str:
        """`error: …`, a table if there is one, a blank line, `hint: …`."""
        parts = [f"error: {self.message}\n"]
        if self.details:
            parts.append(f"{self.details.rstrip()}\n")
        if self.hint:
            parts.append(f"hint: {self.hint}\n")
        return "\n".join(parts)

    def to_json(self) -> dict[str, object]:
        """The object of `--json`; the same keys for every error."""
        error = {
            "message": self.message,
            "code": self.code,
            "hint": self.hint,
            "numbers": self.numbers,
        }
        return {**self.extra, "error": error}


def describe(error: Exception) -> Failure:
    """Turn any exception that reached the top into a Failure; ours keep their own words."""
    if isinstance(error, LoadmasterError):
        return _ours(error)
    if isinstance(error, click.UsageError):
        return _usage(error)
    if isinstance(error, click.ClickException):
        return Failure(message=error.format_message(), exit_code=2, code="invalid_request")
    if isinstance(error, OSError) and error.strerror:
        return _from_os(error)
    return Failure(
        message=f"unexpected {type(error).__name__}: {error}",
        exit_code=1,
        code="internal",
        hint=_OUR_FAULT_HINT,
    )


def _ours(error: LoadmasterError) -> Failure:
    details, extra = "", {}
    outcome = getattr(error, "outcome", None)
    if outcome is not None:
        from loadmaster.interfaces.cli.render import refusal_table
        from loadmaster.plan.codec import does_not_fit_to_json

        details, extra = refusal_table(outcome), does_not_fit_to_json(outcome)
    return Failure(
        message=error.message,
        exit_code=error.exit_code,
        code=error.code,
        hint=error.hint,
        numbers=error.numbers,
        details=details,
        extra=extra,
    )


def _usage(error: click.UsageError) -> Failure:
    message = error.format_message().rstrip(".")
    hint = None
    if isinstance(error, click.NoSuchOption) and error.possibilities:
        close = ", ".join(f"`{name}`" for name in sorted(error.possibilities)[:3])
        message = error.message.rstrip(".")  # without the guesses, which are the hint
        hint = f"did you mean {close}?"
    if hint is None and error.ctx is not None:
        hint = f"`{error.ctx.command_path} --help` lists what it takes"
    message = message[:1].lower() + message[1:]
    return Failure(message=message, exit_code=2, code="invalid_request", hint=hint)


def _from_os(error: OSError) -> Failure:
    place = f"`{error.filename}`: " if error.filename else ""
    missing = isinstance(error, FileNotFoundError)
    return Failure(
        message=f"{place}{error.strerror}",
        exit_code=4 if missing else 1,
        code="not_found" if missing else "os_error",
    )
