"""The errors that a user of the framework can cause, and only those."""


class MamlError(ValueError):
    """A setting, a file or a run is not usable; the message says what, why, and what to do."""


class Unavailable(MamlError):
    """This machine lacks something that the run needs: data, a package, a device."""


class Diverged(MamlError):
    """Parameters are not finite, or what they compute is not."""


class Disconnected(MamlError):
    """Another process of the run is gone; nothing is wrong with this one."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; its state is saved and the same command resumes it."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)  # both, so that it can pass from a sweep's process to another
        self.signal_number = signal_number

    def __str__(self) -> str:
        return self.args[0]
