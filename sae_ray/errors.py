"""The exception tree, drawn once.

    SaeRayError
      ├── ConfigError      a setting is missing, unknown or out of its range
      ├── PoolError        the pool cannot be read, or holds too little that can
      ├── ModelError       model, tokenizer, hook point and SAE do not fit each other
      ├── ArtifactError    a folder on disk is not what it is taken for, or cannot be written
      ├── TaskError        a task is empty, or cannot be told from the rest of the pool
      ├── WorkError        a worker failed at work that it names, or the cluster did
      ├── TrainingError    a training cannot go on: a loss is no number, or has blown up
      ├── RegistryError    an expert is not in the registry, not what it was, or not fit to use
      ├── EndpointError    a chat endpoint refuses, does not answer, or is none
      ├── RequestError     an engine is asked for what it cannot answer, whenever it is asked
      └── BusyError        an engine has more to do than it takes on: ask again later

What a user can cause is one of these. Each message has three parts: what was given, what is
allowed, what to do. A broken invariant is an `assert` instead: that one is our mistake.
"""


class SaeRayError(Exception):
    """Something the user can put right; a job prints it as one line and exits 2."""


class ConfigError(SaeRayError):
    """A setting is missing, unknown or out of its range."""


class PoolError(SaeRayError):
    """The pool cannot be read, or holds too little that can."""


class ModelError(SaeRayError):
    """Model, tokenizer, hook point and SAE do not fit each other."""


class ArtifactError(SaeRayError):
    """A folder on disk is not what it is taken for, or cannot be written."""


class TaskError(SaeRayError):
    """A task is empty, or cannot be told from the rest of the pool."""


class WorkError(SaeRayError):
    """A worker failed at work that it names, or the cluster did."""


class TrainingError(SaeRayError):
    """A training cannot go on: a loss is no number, or has blown up."""


class RegistryError(SaeRayError):
    """An expert is not in the registry, not what it was, or not fit to use."""


class EndpointError(SaeRayError):
    """A chat endpoint refuses, does not answer, or is none."""


class RequestError(SaeRayError):
    """An engine is asked for what it cannot answer, whenever it is asked."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        """The part of the request that is at fault."""
        self.code = code
        """A word by which programs know the fault: `context_length_exceeded`."""


class BusyError(SaeRayError):
    """An engine has more to do than it takes on: ask again later."""
