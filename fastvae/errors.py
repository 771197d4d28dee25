"""The one exception for what a user can put right; the command line prints its line and exits with code 2."""


class FastvaeError(ValueError):
    """A wrong argument, file or setting. The message is one line: what was got, and what was expected."""
