"""The error policy of the command line: which errors end in one line, and what that line says.

Exit codes: 0 done, 2 the user's mistake (one line, no traceback), 1 ours, 130 interrupted with the state saved.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from io import TextIOWrapper
from typing import NoReturn, TextIO

from atesd.launch import launched

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_MISPLACED = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# Libraries written in Rust (safetensors, tokenizers) raise their own errors around the system's.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
# shutil copies folders on behind an error, and raises the texts of all.
_SEVERAL = re.compile(r"\[Errno (\d+)\]")


def user_line(error: Exception) -> str | None:
    """Return the line for an error that the user can mend, or None for one that is ours."""
    from atesd.own import raised_in
    from atesd.types import UserError, first_line  # pydantic comes with it

    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, UserError):
        return f"{error}{notes}"
    if hasattr(error, "format_message"):  # the argument parser's usage errors
        return _usage(error)
    number = _system_error(error)
    what = getattr(error, "filename", None) or "the output"
    if number in _FULL:
        return f"disk full while writing {what}: what was complete before is untouched; free some space{notes}"
    if number == errno.EFBIG:
        return f"{what} is larger than files may be here (File too large): raise the limit, ulimit -f{notes}"
    if number in _REFUSED:
        return f"no permission to write {what} ({os.strerror(number)}): {_elsewhere(what)}{notes}"
    if number in _MISPLACED or (number == errno.ENOENT and _is_cache(what)):
        return f"{what} cannot be written ({os.strerror(number)}): {_elsewhere(what)}{notes}"
    place = raised_in(error)
    if place is not None:
        said = f": {first_line(error)}" if str(error).strip() else ""
        return f"code of yours raised {type(error).__name__}{said} ({place}): mend it{notes}"
    return None


def _elsewhere(path: str | bytes) -> str:
    """Say how something is written to another place."""
    return f"let {_CACHE} name another place" if _is_cache(path) else "choose another place with --out"


def _is_cache(path: str | bytes) -> bool:
    """Tell whether a path belongs to torch, which has a place for what it compiles, made whenever it is imported."""
    cache = os.environ.get(_CACHE, "")
    return cache != "" and os.fsdecode(path).startswith(cache)


def fail(message: str, code: int) -> NoReturn:
    """Print one line on stderr for each of the message and exit.

    No line where the message is empty, because the help was printed instead.
    """
    if message:
        from atesd.types import one_line

        for line in message.split("\n"):
            print("error:", one_line(line), file=sys.stderr)
    sys.exit(code)


def prepare_streams() -> None:
    """Have what a stream's encoding lacks, as on an ASCII terminal, written as its escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,  # noqa: ARG001
    lineno: int,  # noqa: ARG001
    file: TextIO | None = None,  # noqa: ARG001
    line: str | None = None,  # noqa: ARG001
) -> None:
    """Print our own warnings as one line each; leave out those by which libraries speak to developers."""
    if category is UserWarning and launched()[0] == 0:
        print(f"warning: {message}", file=sys.stderr)


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "atesd"
    message = error.format_message()  # type: ignore[attr-defined]
    if re.fullmatch(r"--[\w-]+(\.[\w-]+)+", getattr(error, "option_name", "")):
        return f"{message.rstrip('.')}: an override has no dashes, section.key=value"
    return f"{message.rstrip('.')} ({command} --help)" if message else ""


def _system_error(error: Exception) -> int:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _RUST_ERROR.search(str(error)) or _SEVERAL.search(str(error))
    return int(found[1]) if found else 0
