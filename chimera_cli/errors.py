"""Failures that a user can mend, and the exit codes of every command."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process tells the shell."""

    OK = 0
    ERROR = 1
    USAGE = 2
    BREACHED = 3
    UNMEASURED = 4
    INTERRUPTED = 130


class ChimeraError(Exception):
    """A known failure: one sentence that names the file, line or key, and one hint that says what to do.

    The command line prints both on stderr without a traceback and leaves with `exit_code`.
    """

    def __init__(self, message: str, hint: str = "", exit_code: ExitCode = ExitCode.ERROR) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


class UsageError(ChimeraError):
    """What was typed cannot be meant: a wrong option value, an unknown config key, a run that is not there."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint, ExitCode.USAGE)
