"""Progress bars on stderr: what is done, the rate and the time left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(
    total: int | None, unit: str, description: str, initial: int = 0, *, is_shown: bool = True
) -> tqdm[Any]:
    """A progress bar on stderr that shows rate and time left.

    Parameters
    ----------
    total
        number of units of the whole work, done ones included; None: not known, they are only counted
    unit
        what is counted, such as ``"token"``
    description
        the stage's name, at the left of the bar
    initial
        units that an earlier, interrupted call has done
    is_shown
        whether anything is printed; of several processes at one work only one does

    On a terminal the line is redrawn twice a second; in a log file once in ten seconds, so that a log
    stays readable.
    """
    return tqdm(
        total=total,
        initial=initial,
        disable=not is_shown,
        unit=f" {unit}s",
        unit_scale=True,
        desc=description,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )
