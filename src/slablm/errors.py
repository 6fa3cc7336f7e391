"""The one exception that means "your input, not our bug"."""


class SlabError(ValueError):
    """A problem the user can solve: the message is one line that names the culprit and the way out.

    The command line prints it without a traceback and exits with status 1.
    """
