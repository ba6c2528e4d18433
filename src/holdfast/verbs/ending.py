"""How a command ends: one message and an exit code that means one thing.

    0    done (check, repair: kept)      2    a mistake that can be mended
    1    check: lost; repair, tune:      70   a fault of Holdfast: one sentence, the traceback in a file
         not met; compare: a run failed
    3    not enough evidence             130  Ctrl-C;  141: nobody reads the output any more;  128 + n: signal n

Python itself, typer and rich end with 1 on errors of their own, and a library may call sys.exit: a pipeline would read
all of that as "lost". So whatever a command raises comes here. Importing this module is cheap.
"""

from __future__ import annotations

import errno
import os
import re
import select
import sys
import time
import traceback
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError, out_of_memory

MISTAKE, FAULT, STOPPED, UNREAD = 2, 70, 130, 141  # 70 is EX_SOFTWARE of sysexits.h, the others are the shell's
PEERS = ("closed by peer", "reset by peer", "gloo", "nccl", "tcpstore")  # a collective call that others have left
NATIVE = re.compile(r"\(os error (\d+)\)")  # of a library in Rust (tokenizers, safetensors), in an error of its own
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
GOES_ON = ("tune", "repair", "compare")  # from where they were
MEMORY_CURES = {
    "tune": "Lower training.per_device_train_batch_size and raise gradient_accumulation_steps by as much; if it "
    "happened while measuring, lower measure.batch_tokens.",
    "explain": "Set model.dtype: bfloat16, take a smaller model, or stop other programs that hold memory.",
    "measure": "Lower --batch-tokens (2048 if not given) or --limit, or stop other programs that hold memory.",
    "check": "Lower --batch-tokens (2048 if not given) or --limit, leave out --why (it holds both models), or stop "
    "other programs that hold memory.",
    "repair": "Lower --batch-tokens (2048 if not given), or stop other programs that hold memory.",
}


def end(error: BaseException, command: str, debug: bool) -> int:
    """Say on stderr how `error` ended `command`; returns the exit code. `debug` shows the traceback first."""
    if _unread(error):
        return UNREAD
    if isinstance(error, KeyboardInterrupt):
        say("Stopped. The same command goes on from where it was." if command in GOES_ON else "Stopped.")
        return STOPPED
    if os.environ.get("RANK", "0") != "0":  # the first process mostly says the same, and torchrun then ends this one
        time.sleep(3)
    if debug:
        say("".join(traceback.format_exception(error)))
    found = _mistake(error, command)
    if found is None:
        _tell_fault(error, command, debug)
        return FAULT
    what, cure = found
    say(f"Error: {what}" + (f"\n       {cure}" if cure else ""))
    return MISTAKE


def say(text: str) -> None:
    """Print on stderr; where that is closed or full there is nobody to tell."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def flushed(code: int) -> int:
    """Write out what print has kept back; the code that says if that fails. A verdict's own code stays."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except ValueError:  # closed by somebody
        return code
    except OSError as e:
        with suppress(OSError, ValueError):  # else Python tries again at its own end, and exits with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(e, BrokenPipeError):
            return code or UNREAD
        say(f"Error: The output could not be written: {e.strerror or e}.\n       Free some disk space.")
        return code or MISTAKE
    return code


# ---- mistakes


def _mistake(error: BaseException, command: str) -> tuple[str, str] | None:
    """(what is wrong, what to do) of an error that a user can mend; None for a fault."""
    if out_of_memory(error):
        return "There is not enough memory for this run.", MEMORY_CURES.get(
            command, "Stop other programs that hold memory."
        )
    if isinstance(error, HoldfastError):
        return error.what, error.cure
    if isinstance(error, (ConnectionError, TimeoutError)):
        return f"A connection broke: {_line(error)}.", "Check the network, and start the same command again."
    cure = "Check the path, its rights and the free disk space; nothing finished was lost."
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename or 'no file named'}).", cure
    native = NATIVE.search(str(error))
    if native and int(native[1]) in DISK:
        return f"{os.strerror(int(native[1]))} (no file named).", cure
    return None


def _unread(error: BaseException) -> bool:
    """Whether the reader of our output (head, a pager) has gone. rich turns that into SystemExit(1)."""
    if isinstance(error, SystemExit):
        return isinstance(error.__context__, BrokenPipeError)
    return isinstance(error, BrokenPipeError) and (_gone(sys.stdout) or _gone(sys.stderr))


def _gone(stream: Any) -> bool:
    """Whether this stream is a pipe that nobody reads; True where the system cannot tell."""
    if not hasattr(select, "poll"):
        return True
    with suppress(OSError, ValueError, AttributeError):
        watch = select.poll()
        watch.register(stream.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))
    return False


# ---- faults


def _tell_fault(error: BaseException, command: str, debug: bool) -> None:
    """What failed, whose fault it is, and where the traceback lies."""
    name = f"holdfast {command}".strip()
    what = f"Error: {name} failed ({_line(error)}); this is a fault of Holdfast, not yours."
    if _peer_ended(error):
        what = f"Error: {name} cannot go on: another process of this run has ended ({_line(error)})."
    if debug:
        say(f"{what}\n       Please report it with the traceback above.")
        return
    try:
        path = _write_traceback(error, command)
    except (OSError, HoldfastError) as e:
        say(f"{what}\n       Its traceback could not be written ({_line(e)}), so it follows.")
        say("".join(traceback.format_exception(error)))
        return
    say(f"{what}\n       The traceback is in {path}; please report it with what `holdfast doctor` says.")


def _line(error: BaseException) -> str:
    """Kind and words of an error in one line of at most 300 characters."""
    if isinstance(error, SystemExit):
        return f"a library ended the program with exit code {error.code}"
    words = " ".join(str(error).split())
    words = words if len(words) <= 300 else words[:297] + "..."
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _peer_ended(error: BaseException) -> bool:
    """Whether this is one of several processes, left alone in the middle of a collective call."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return several and isinstance(error, RuntimeError) and any(words in str(error).lower() for words in PEERS)


def _write_traceback(error: BaseException, command: str) -> Path:
    """Put the traceback into a new file of the cache folder, with the command line; returns its path."""
    from holdfast.files import cache_dir
    from holdfast.versions import __version__

    folder = cache_dir() / "crashes"
    folder.mkdir(exist_ok=True)
    path = folder / f"{datetime.now():%Y%m%d-%H%M%S}-{command or 'start'}-{os.getpid()}.txt"
    lines = [f"holdfast {__version__}, Python {sys.version}", f"command: {sys.argv}", ""]
    path.write_text("\n".join(lines) + "\n" + "".join(traceback.format_exception(error)), encoding="utf-8")
    return path
