"""Going on with a store that was begun: what it and a harvest, or the dry run of one, must have in common.

The plan, tokens included, is in the store, so the corpus is not read again, and a model or a dictionary is
loaded and compared only if there is something for it to do.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tcsae.harvest.config import HarvestConfig
from tcsae.harvest.locate import canonical_name
from tcsae.harvest.model import LanguageModel, load_model
from tcsae.harvest.plan import check_space, provenance_of
from tcsae.harvest.synthetic import SyntheticSource, truth_source
from tcsae.harvest.synthetic_run import first_document_sha256
from tcsae.harvest.synthetic_run import provenance_of as synthetic_provenance
from tcsae.harvest.synthetic_settings import is_synthetic, parse_synthetic
from tcsae.harvest.workers import fingerprint
from tcsae.store.errors import StoreMismatch
from tcsae.store.layout import Layout
from tcsae.store.metadata import FIRST_BATCH, ROOT, read_root
from tcsae.store.planning import refuse_existing
from tcsae.store.spec import Provenance
from tcsae.store.truth import read_truth
from tcsae.store.writer import refuse_other_settings


def is_begun(config: HarvestConfig) -> bool:
    """Whether there is a store to go on with; raises `StoreExists` if something is there that is not to be resumed."""
    begun = (config.store / ROOT).exists()
    if not (begun and config.resume):
        refuse_existing(config.store)
    return begun


def settings_begun_with(config: HarvestConfig) -> Provenance:
    """What the store was begun with; raises `StoreMismatch`, which names all that differs, if ``config`` asks for else.

    Only what ``config`` says is compared, and with a synthetic corpus the packages' versions too.
    """
    stored = Provenance.from_dict(read_root(config.store), str(config.store / ROOT))
    if is_synthetic(config.corpus):
        asked = synthetic_provenance(config, parse_synthetic(config.corpus), stored.corpus_sha256)
        _refuse_other_parameters(config, stored, asked)
    else:
        asked = replace(
            stored,
            model=canonical_name(config.model),
            hooks=config.hooks,
            context_length=config.context_length,
            dtype=config.dtype,
            precision=config.precision,
            rows_per_chunk=config.rows_per_chunk,
            corpus=config.corpus,
            max_tokens=config.max_tokens,
        )
    refuse_other_settings(config.store, stored, asked)
    return stored


def model_to_go_on_with(
    config: HarvestConfig, stored: Provenance, layout: Layout, n_missing: int
) -> tuple[LanguageModel, str]:
    """The model that computes the missing chunks, and its `fingerprint`.

    Raises
    ------
    StoreMismatch
        it is not the one that the store was begun with, other packages run it, or it rounds differently here
    DiskFull
        the missing chunks do not fit on the disk
    """
    model = load_model(config.model, precision=config.precision, device=config.device)
    refuse_other_settings(config.store, stored, provenance_of(config, model, stored.corpus_sha256))
    check_space(config.store, stored, n_missing)
    first = fingerprint(config, model, layout)
    _check_rounding(config, model.device, first)
    return model, first


def source_to_go_on_with(config: HarvestConfig, stored: Provenance, n_missing: int) -> SyntheticSource:
    """What draws the missing chunks of a synthetic corpus; raises as `model_to_go_on_with`."""
    source = truth_source(config.store, stored, read_truth(config.store, stored))
    check_space(config.store, stored, n_missing)
    _check_rounding(config, "numpy", first_document_sha256(source))
    return source


def _refuse_other_parameters(config: HarvestConfig, stored: Provenance, asked: Provenance) -> None:
    """Name those that differ one by one: the two objects in a line would hide them."""
    if stored.truth is None or asked.truth is None:
        return
    begun, now = stored.truth["parameters"], asked.truth["parameters"]
    if differing := [
        f"{k}: begun with {begun.get(k)!r}, now {v!r}" for k, v in now.items() if begun.get(k) != v
    ]:
        raise StoreMismatch(
            f"{config.store}: begun with other parameters: {'; '.join(differing)}; resume with the first ones or "
            "choose another path"
        )


def _check_rounding(config: HarvestConfig, computed_by: object, first: str) -> None:
    """Raise `StoreMismatch` if the chunks that are there were computed with other last bits than here."""
    begun = read_root(config.store).get(FIRST_BATCH, first)  # a store from before it was kept has none
    if begun != first:
        raise StoreMismatch(
            f"{config.store}: begun on a machine that rounds differently: the activations of one batch have "
            f"SHA-256 {begun[:12]}… there and {first[:12]}… here ({computed_by}, "
            f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}), so the store would be "
            "of two kinds; resume on a machine of the first kind with the same OMP_NUM_THREADS, or delete the store "
            "and harvest again"
        )
