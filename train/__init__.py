"""Training: several SAEs side by side in one pass over an activation store.

Imports `tcsae.store` and nothing else of ours.
"""

from tcsae.train.config import ArmConfig, TrainConfig
from tcsae.train.dryrun import DryRun, dry_run
from tcsae.train.loop import train
from tcsae.train.plots import plot_run
from tcsae.train.recipes import load_recipe, load_recipes, recipe_names
from tcsae.train.run import Run
from tcsae.train.sae.inference import SAE
from tcsae.train.saelens import load_sae, save_sae
from tcsae.train.settings import load_config, with_settings

__all__ = [
    "SAE",
    "ArmConfig",
    "DryRun",
    "Run",
    "TrainConfig",
    "dry_run",
    "load_config",
    "load_recipe",
    "load_recipes",
    "load_sae",
    "plot_run",
    "recipe_names",
    "save_sae",
    "train",
    "with_settings",
]
