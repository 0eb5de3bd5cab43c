"""The three ways a command can end early, each with its exit code."""

__all__ = ["InputError", "Interrupted", "RunError"]


class InputError(ValueError):
    """What the user gave cannot be used: a file, a field, a size. Exit code 2.

    The message is one sentence that names the file or field, the value, and what would be right.
    """

    exit_code = 2


class RunError(RuntimeError):
    """Work that began well failed midway: a full disk, a loss that is not finite. Exit code 3."""

    exit_code = 3


class Interrupted(RuntimeError):
    """A signal ended the work after its state was saved; it can be resumed. Exit code 75."""

    exit_code = 75
