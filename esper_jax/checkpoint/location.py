"""Where checkpoints go: an absolute path, whatever the working directory becomes."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["CheckpointError", "absolute", "plain", "printable", "words"]

_REMOTE = re.compile(
    r"[A-Za-z][\w+.-]*://|(gs|gcs|s3|az|abfss?|hdfs|https?|ftp|file):/"
)
_PLAIN = re.compile(r"[A-Za-z0-9_./+=,-]+")
_DESCRIPTORS = Path("/proc/self/fd")


class CheckpointError(ValueError):
    """A checkpoint that cannot be saved or restored; says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text in one line that a terminal shows and does not obey.

    Names in a checkpoint are whatever its writer chose, escape sequences included.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def absolute(directory: Path | str) -> Path:
    """The absolute path of a directory on a local or mounted file system.

    Raises:
      CheckpointError: if it is another kind of place, or no path.
    """
    try:
        text = os.fspath(directory)
    except TypeError:
        text = None
    if not isinstance(text, str) or not text or "\0" in text:
        raise CheckpointError(f"directory: expected a path, got {directory!r}")
    if _REMOTE.match(text):
        raise CheckpointError(
            f"directory: expected a path on a local or mounted file system, got {text}:"
            " save locally and copy the steps there, or mount the bucket"
        )
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # ~nobody
        raise CheckpointError(f"directory: {text}: {error}") from None
    except FileNotFoundError:
        raise CheckpointError(
            f"directory: {text} is relative, and the working directory is gone: "
            "give an absolute path"
        ) from None


@contextlib.contextmanager
def plain(folder: Path) -> Iterator[Path]:
    """A path of the folder that Orbax takes for no pattern and no other folder.

    Orbax reads ``[a]`` and ``*`` as patterns, and a backslash as a slash: arrays would
    land in other folders. Such a folder is reached through its descriptor instead.

    Raises:
      CheckpointError: if the system gives descriptors no path.
    """
    folder = folder.resolve()
    if _PLAIN.fullmatch(str(folder)):
        yield folder
        return
    if not _DESCRIPTORS.is_dir():
        raise CheckpointError(
            f"directory: {folder} has characters that Orbax takes for a pattern: "
            "choose a path of letters, digits and _ . / + = , -"
        )
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _DESCRIPTORS / str(descriptor)
    finally:
        os.close(descriptor)


def words(error: OSError) -> str:
    """What the system says of an error, with the file's path if it names one."""
    text = error.strerror or (os.strerror(error.errno) if error.errno else str(error))
    if error.errno == errno.ELOOP:
        text = "a link leads in a circle"
    return f"{text} ({error.filename})" if error.filename else text
