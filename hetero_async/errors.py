"""Every exception that somebody catches, by whose fault it is. Messages are one readable line.

HeteroAsyncError
├── UserError            wrong input from a person: says what, where, what is allowed, what to do next
│   ├── ConfigError      run.toml, key files, directories
│   ├── SchemaError      the model differs from the run's model
│   └── DatasetError     the dataset cannot be leased
├── PeerError            the other side broke the protocol; it is refused, we live on
├── RefusedError         the server turned us away for good, with its reason
├── WorkerDied           a worker process ended badly; its agent starts it again
├── WitnessAway          the witness has not answered, or not for sure: look again before doing anything
├── ArchiveAway          the archive has not taken or given an object: try again
├── ArchiveConflict      the archive holds other bytes under a name that is ours: a person must look
├── Deposed              another server reigns in a higher term: this one stops serving (exit code 69)
├── DiskFull             no space: the caller pauses and tries again, nothing was half kept
└── LogCorrupt           stored bytes are not what was written: halt (exit code 65), never guess
"""

from typing import TypeVar

E = TypeVar("E", bound=BaseException)

# sysexits.h: EX_DATAERR and EX_IOERR, so that a supervisor can tell corruption from a failing disk.
EXIT_CORRUPT = 65
EXIT_DISK_FAILED = 74
# EX_UNAVAILABLE: starting it again as a server will not help, as a standby it will.
EXIT_DEPOSED = 69


class HeteroAsyncError(Exception):
    """Root of all errors that this package raises on purpose."""


class UserError(HeteroAsyncError):
    """Input from a person that cannot be used."""


class ConfigError(UserError):
    """run.toml, a key file or a directory cannot be used."""


class SchemaError(UserError):
    """The model in hand is not the model that the run trains."""


class DatasetError(UserError):
    """The dataset cannot be leased out as the run needs it."""


class PeerError(HeteroAsyncError):
    """Bytes from a peer that the protocol does not allow."""


class RefusedError(HeteroAsyncError):
    """The server refused this worker and will go on refusing it."""


class WorkerDied(HeteroAsyncError):
    """A worker's process ended with an exit code or a signal."""


class WitnessAway(HeteroAsyncError):
    """The witness has not answered in time, or what became of a transaction is not known."""


class ArchiveAway(HeteroAsyncError):
    """The archive cannot be reached, or refused; what it was asked for may or may not have been done."""


class ArchiveConflict(HeteroAsyncError):
    """An object of this name is in the archive with other content; nothing was overwritten."""


class Deposed(HeteroAsyncError):
    """Another server reigns in a higher term."""


class DiskFull(HeteroAsyncError):
    """A write found no space; what was written of it has been cut off again."""


class LogCorrupt(HeteroAsyncError):
    """A stored record or checkpoint fails its checksum, chain or numbering."""


def first_error(group: BaseExceptionGroup[E]) -> E:
    """The first error in a group of groups, which is the one to tell a person."""
    first = group.exceptions[0]
    return first_error(first) if isinstance(first, BaseExceptionGroup) else first
