"""The one exception family of the engine. Each message names the offending value and the remedy."""

from __future__ import annotations


class MlxfunError(Exception):
    """Base class: the message is shown to the user as it is."""


class UsageError(MlxfunError):
    """An argument or option that can be seen to be wrong before any work starts."""


class ModelError(MlxfunError):
    """A model that is missing, broken, unsupported, or does not fit."""


class DatasetError(MlxfunError):
    """A data set that is missing, empty or malformed; names file and line."""


class HookError(MlxfunError):
    """A module to observe or to intervene in that does not exist, or that no forward reached."""


class PlanError(MlxfunError):
    """A plan that cannot be carried out on this model."""


class StateError(MlxfunError):
    """An operation that the present state does not allow (nothing staged, nothing to undo...)."""


class BudgetError(MlxfunError):
    """Memory, undo or disk budget exceeded; the message holds the figures."""


class SaveError(MlxfunError):
    """A file or model that could not be written, or a model that failed the gate after writing."""


class Cancelled(MlxfunError):
    """The job was cancelled; whatever it was editing is as it was before."""


class WorkerError(MlxfunError):
    """A worker process that ended, hung, failed, or holds another model; names it and its log."""
