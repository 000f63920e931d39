"""The two ways a command ends badly without being a bug of ours: a user's mistake, and a run that must stop."""


class UserError(Exception):
    """Something from outside (flag, file, folder, prompt, picture) is wrong.

    The message says what came, what was expected and what to do. The command line prints it alone and exits with 2.
    """


class RunStopped(Exception):
    """A run cannot honestly go on (NaN or infinity in reward, loss or gradient).

    The message names step, prompt and tensor. Nothing broken has been saved; the command line exits with 1.
    """
