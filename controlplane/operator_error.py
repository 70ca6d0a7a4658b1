"""What an operator can mend."""


class OperatorError(Exception):
    """A command or a program cannot do its work. The message says why and what to do: it is all that is printed."""
