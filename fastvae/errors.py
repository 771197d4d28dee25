"""The exceptions that the command line turns into one line and an exit code."""


class Stopped(Exception):  # noqa: N818 (it is no error: the run was asked to stop, and can go on)
    """A signal ended the run; everything is saved. The exit code is 128 + signum, as the shell's."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class FastvaeError(ValueError):
    """What a user can put right (exit code 2). The message is one line: what was got, and what was expected."""


class RankLost(FastvaeError):  # noqa: N818 (the name says it)
    """A rank can no longer reach the others: the one error that a rank other than 0 has to tell of itself."""


def one_line(error: BaseException) -> str:
    """What another library said, for use in a message of ours."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__
