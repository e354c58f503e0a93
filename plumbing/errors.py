"""The ways in which a program ends early, each with one line for the user."""


class BadInput(Exception):
    """Something the user gave cannot be used. The message is one line: what, where (file, line, field), and the remedy."""


class Complete(Exception):
    """All is done already: a run that was killed just before its end was asked to go on. The message says so."""


class Stopped(Exception):
    """A signal asked to stop, and the work so far is saved. The message says how to go on."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number
