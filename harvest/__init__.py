"""From documents to an activation store: read the corpus, plan every row's place, run the model once."""

from tcsae.harvest.config import HarvestConfig
from tcsae.harvest.corpus import Document, read_corpus
from tcsae.harvest.dryrun import DryRun, dry_run
from tcsae.harvest.model import LanguageModel, load_model
from tcsae.harvest.run import HarvestSummary, harvest

__all__ = [
    "Document",
    "DryRun",
    "HarvestConfig",
    "HarvestSummary",
    "LanguageModel",
    "dry_run",
    "harvest",
    "load_model",
    "read_corpus",
]
