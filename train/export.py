"""SAEs of a run as folders that peers load."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tcsae.store.errors import RunError, RunExists, RunNotFound, UnknownName
from tcsae.train.run import RUN_FILE, Run
from tcsae.train.saelens import CONFIG_FILE, load_sae, save_sae

Format = Literal["saelens"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True, slots=True)
class Exported:
    """What `export` has written."""

    format: Format
    saes: list[Path]
    """folders"""


def export(source: str | Path, folder: str | Path, form: str = "saelens") -> Exported:
    """Write the SAE at ``source``, or each SAE of the run there, into ``folder`` in the form of a peer.

    One SAE goes into ``folder`` itself, those of a run into folders of their names below it. Weights are
    read, checked and written again, so what is exported is whole and loads.

    Raises
    ------
    UnknownName
        ``form`` is not one of `FORMATS`
    RunNotFound
        neither an SAE nor a run is there
    RunExists
        there is something at ``folder`` already
    RunError
        the run is not finished, or an SAE is damaged; nothing is written
    """
    source, folder = Path(source), Path(folder)
    known: Format | None = next((one for one in FORMATS if one == form), None)
    if known is None:
        raise UnknownName.among("format", form, FORMATS)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunExists(f"{folder}: already holds something; choose another path")
    if (source / RUN_FILE).exists():
        run = Run.open(source)
        if run.status != "finished":
            raise RunError(
                f"{source}: the run is {run.status} after step {run.step} of {run.steps}, expected finished; go on "
                "with it first, or export one SAE folder"
            )
        found = {folder / sae.name: sae for sae in run.saes}
    elif (source / CONFIG_FILE).exists():
        found = {folder: source}
    else:
        raise RunNotFound(f"{source}: neither a run nor an SAE folder ({RUN_FILE} or {CONFIG_FILE})")
    # All before the first is written, but not all in memory: half an export would be in the way of the next.
    for sae in found.values():
        load_sae(sae)
    try:
        for target, sae in found.items():
            save_sae(load_sae(sae), target)
    except BaseException:  # an interruption too
        for target in found:
            shutil.rmtree(target, ignore_errors=True)
        raise
    return Exported(known, list(found))
