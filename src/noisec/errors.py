"""The one exception that users are meant to read."""


class NoisecError(Exception):
    """Something the user can mend. The message names the value, the limit and the fix; the command line prints it alone."""
