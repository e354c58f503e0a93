"""The ways in which a program ends early. Each has one line for the user, and `cli.run` prints it.

    raise BadInput("samples.jsonl:3: field 'verdict' is missing; add it")     # exit code 2
"""


class BadInput(Exception):
    """What the user gave cannot be used. The message: what is wrong, where (file, line, field), a remedy."""


class Complete(Exception):
    """All is done already: a run that was killed just before its end was asked to go on."""


class Stopped(Exception):
    """A signal asked the run to stop, and the work so far is saved. The message says how to go on."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number
