"""The errors a user can meet: each is one sentence that says what is wrong and where, and a remedy.

Nothing else crosses the command line's border: the CLI prints ``str(error)`` and exits with ``exit_code``; a traceback
is always a defect of ours.
"""


class AutoMergeError(Exception):
    """Base of all errors that a user can cause or repair.

    Args:
        problem: what is wrong and where (file, key, block), without a final full stop.
        remedy: what to do about it; appended after a semicolon.
    """

    exit_code = 2

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(problem, remedy)

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem


class SpecError(AutoMergeError):
    """The spec (or a document that a stage reads) does not say something valid."""


class MissingExtraError(AutoMergeError):
    """A feature needs an optional dependency that is not installed.

    Args:
        feature: what the user asked for.
        extra: the extra of this distribution that brings the dependency.
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs an optional dependency",
            f"install this package with its extra [{extra}]: automerge-models[{extra}]",
        )


class PluginError(AutoMergeError):
    """A technique, task, model kind or registry is unknown, or its entry point does not load."""


class StorageError(AutoMergeError):
    """An object cannot be listed, read or written."""


class CheckpointError(AutoMergeError):
    """A checkpoint is damaged, unsafe, or does not fit the others."""


class ModelError(AutoMergeError):
    """A checkpoint cannot be made to run: the architecture is unknown, or the weights do not fit it."""


class TaskError(AutoMergeError):
    """A task's data or metrics are unusable."""


class MergeError(AutoMergeError):
    """A recipe cannot be applied to its inputs."""


class SearchError(AutoMergeError):
    """A search cannot start, go on, or be resumed."""


class RegistryError(AutoMergeError):
    """The registry refuses or cannot be reached."""


class TriggerError(AutoMergeError):
    """The trigger service cannot start, or cannot do what it is asked for."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device's memory, or the machine's, was too small.

    Without torch: on the CPU it raises a plain RuntimeError anyway.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
