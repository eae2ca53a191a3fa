"""A mistake of the user's, told in one message instead of a traceback."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence

USER_ERROR = 2  # exit code, as argparse uses it
INTERRUPTED = 130  # 128 + SIGINT


def exit_code_of(
    main: Callable[[Sequence[str] | None], int | None],
    arguments: Sequence[str] | None = None,
    *,
    name: str = "",
    debug: bool = False,
) -> int:
    """Run a command's `main` and return its exit code: 2 for a mistake of the user's, said in one message.

    Args:
        main: takes the command line, None for the process's own.
        arguments: the command line.
        name: what the message starts with.
        debug: show the whole traceback too.
    """
    try:
        return main(arguments) or 0
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"{name}: {error}" if name else error, file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
