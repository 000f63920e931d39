"""The ways a command ends without being a bug of ours: a user's mistake, a run that must stop, a run asked to stop."""


class UserError(Exception):
    """Something from outside (flag, file, folder, prompt, picture) is wrong.

    The message says what came, what was expected and what to do. The command line prints it alone and exits with 2.
    """

    elsewhere = False  # it happened to another rank of a distributed run, which says it


class RunStopped(Exception):
    """A run cannot go on: NaN or infinity in reward, loss or gradient, or too little memory.

    The message names the step. Nothing broken has been saved; the command line exits with 1.
    """

    elsewhere = False  # as above


class NotFinite(RunStopped):
    """NaN or infinity: the message names step, prompt and tensor. The batch was not stepped and may be skipped."""


class RunInterrupted(Exception):
    """A run that was asked to stop (a signal, or its time is up), has saved itself and can be resumed.

    `status` is the command line's exit status: 130 after SIGINT, 143 after SIGTERM, 75 when `max_hours` are over.
    """

    elsewhere = False  # as above

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
