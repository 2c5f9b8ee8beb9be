"""Every error that tcsae raises on purpose.

    TcsaeError                      one line for the user, exit 1
    ├── ConfigError (ValueError)            a field or option has a value that cannot work
    │   └── UnknownName (LookupError)       a name that is not one of a known set; lists the nearest
    ├── CorpusError (ValueError)            the documents cannot be read, or none is usable
    ├── ModelNotFound (FileNotFoundError)   no model under that name or folder
    ├── ActivationError (ArithmeticError)   NaN, Inf or an overflow in an activation
    ├── StoreError                          about one activation store
    │   ├── StoreNotFound (FileNotFoundError)
    │   ├── StoreExists (FileExistsError)
    │   ├── StoreIncomplete (RuntimeError)  the harvest has not finished
    │   ├── StoreCorrupt (ValueError)       a chunk or table is missing, truncated or altered
    │   ├── StoreMismatch (ValueError)      made by another model, tokenizer, hook or with other settings
    │   ├── StoreBusy (BlockingIOError)     another process is writing
    │   └── RemoteError (ConnectionError)   a server cannot be reached, refuses, or answers too slowly
    ├── RunError                            about one training run or evaluation folder
    │   ├── RunExists (FileExistsError)
    │   ├── RunNotFound (FileNotFoundError)
    │   ├── RunMismatch (ValueError)
    │   ├── RunBusy (BlockingIOError)
    │   └── TrainingCollapsed (ArithmeticError)   L0 = 0, NaN or nearly all features dead
    ├── WorkersLost (RuntimeError)          a worker process died, on a task again and again
    ├── DiskFull (OSError)                  nothing half-written is left behind
    └── Interrupted                         state is saved; exit 130

Each is also the built-in error that fits, so either ``except`` works. A message names the path, the
field, what was expected, what was found and what to do, on one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TcsaeError(Exception):
    """A mistake of the user's or of the data; the command line prints it in one line and exits 1."""


class ConfigError(TcsaeError, ValueError):
    """A field or option has a value that cannot work."""


class UnknownName(ConfigError, LookupError):
    """A name that is not one of a known set."""

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str]) -> UnknownName:
        """The error for ``name``, listing the nearest of the ``known`` names (or the first ten)."""
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:10]
        return cls(f"unknown {kind} {name!r}; did you mean: {', '.join(near)}")


class CorpusError(TcsaeError, ValueError):
    """The documents cannot be read, or none of them is usable."""


class ModelNotFound(TcsaeError, FileNotFoundError):
    """No model under that name or folder."""


class ActivationError(TcsaeError, ArithmeticError):
    """NaN, Inf or an overflow in an activation; nothing was written for its chunk."""


class StoreError(TcsaeError):
    """Something about one activation store."""


class StoreNotFound(StoreError, FileNotFoundError):
    """There is no store at that path."""


class StoreExists(StoreError, FileExistsError):
    """There is already something at the path a new store was to be written to."""


class StoreIncomplete(StoreError, RuntimeError):
    """The harvest that makes this store has not finished."""


class StoreCorrupt(StoreError, ValueError):
    """A chunk or table of the store is missing, truncated or altered."""


class StoreMismatch(StoreError, ValueError):
    """The store was made by another model, tokenizer or hook, or with other settings, than asked for."""


class StoreBusy(StoreError, BlockingIOError):
    """Another process is writing to the store."""


class RemoteError(StoreError, ConnectionError):
    """A store elsewhere cannot be reached, its server refuses, or it answers too slowly."""


class RunError(TcsaeError):
    """Something about one training run or evaluation folder."""


class RunExists(RunError, FileExistsError):
    """There is already a run at that path."""


class RunNotFound(RunError, FileNotFoundError):
    """There is no run, or no SAE, at that path."""


class RunMismatch(RunError, ValueError):
    """The run was made with another store or other settings than asked for."""


class RunBusy(RunError, BlockingIOError):
    """Another process is writing to the run."""


class TrainingCollapsed(RunError, ArithmeticError):
    """An SAE has collapsed: L0 = 0, a NaN loss, or nearly every feature dead."""


class WorkersLost(TcsaeError, RuntimeError):
    """Worker processes or their scheduler have died for good; what is finished is kept."""


class DiskFull(TcsaeError, OSError):
    """The disk is full; nothing half-written is left behind and the command can be resumed."""


class Interrupted(TcsaeError):
    """The user or the system stopped the command; its state is saved and the message says how to resume."""
