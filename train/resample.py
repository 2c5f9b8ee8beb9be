"""Dead-feature resampling: dead features begin anew at tokens that are badly reconstructed.

After Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron resampling". Where we depart from it: the
tokens are those of the step's batch, each taken at most once, so with more dead features than tokens the rest
waits for the next time; and there is no last round so late that what begins anew could not learn.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from tcsae.train.config import ArmConfig
from tcsae.train.sae.base import TrainableSAE
from tcsae.train.sae.build import build

ENCODER_SHARE = 0.2
"""norm of a new encoder row relative to the mean of the living ones', so that it does not fire at once everywhere"""

_OF_OUTPUT = ("b_dec", "output_norm.gain")
"""parameters with an entry for each dimension of the activations, of which there may be as many as features"""


def resampling_is_due(config: ArmConfig, step: int, steps: int) -> bool:
    """After ``step`` (0-based): every ``resample_every`` steps, but not in the last so many of the run.

    >>> arm = ArmConfig(name="a", resample_every=10)
    >>> [step for step in range(35) if resampling_is_due(arm, step, 35)]
    [9, 19]
    """
    every = config.resample_every
    return every > 0 and (step + 1) % every == 0 and step + 1 + every <= steps


def feature_parameters(sae: TrainableSAE) -> list[str]:
    """Names of the parameters that have a row or an entry for each feature."""
    n = len(sae.b_enc)
    return [name for name, p in sae.named_parameters() if name not in _OF_OUTPUT and len(p) == n]


@torch.no_grad()
def resample(
    sae: TrainableSAE,
    optimizer: torch.optim.Optimizer,
    dead: Int64[Tensor, " dead"],
    x: Float[Tensor, "token d_model"],
    error: Float[Tensor, "token d_model"],
    stream: np.random.Generator,
) -> Int64[Tensor, " resampled"]:
    """Let ``dead`` features begin anew, each at a token drawn with probability ~ ||error||^4; returns which did.

    The loss of a token is the square of its error, and probabilities are in proportion to the square of the
    loss. With v the token's ``x - b_dec`` at unit norm a feature's decoder row becomes v, its encoder row v
    times `ENCODER_SHARE` of the living encoder rows' mean norm, its bias 0, its other parameters what they
    were at first, its moments in ``optimizer`` 0 and its dead counter 0.

    Parameters
    ----------
    sae, optimizer
        changed in place
    dead
        features, different
    x, error
        the batch's valid tokens in normalised units and x - x_hat; what has no error is never drawn
    stream
        draws
    """
    centred = x - sae.b_dec
    loss = error.double().square().sum(dim=1)
    loss[centred.abs().amax(dim=1) == 0] = 0
    weight = loss.square().cpu().numpy()
    n = min(len(dead), int(np.count_nonzero(weight)))
    if n == 0:
        return dead[:0]
    drawn = stream.choice(len(weight), size=n, replace=False, p=weight / weight.sum())
    features = dead[torch.from_numpy(stream.permutation(len(dead))[:n]).to(dead.device)]
    direction = normalize(centred[torch.from_numpy(drawn).to(x.device)], dim=1)
    norms = torch.linalg.vector_norm(sae.W_enc, dim=1)
    alive = torch.ones_like(norms, dtype=torch.bool)
    alive[dead] = False
    norm = (norms[alive] if alive.any() else norms).mean()

    fresh = build(x.shape[1], sae.config, 0).to(x.device)
    for name in feature_parameters(sae):
        parameter = sae.get_parameter(name)
        parameter[features] = fresh.get_parameter(name)[features]
        for moment in optimizer.state[parameter].values():
            if moment.shape == parameter.shape:
                moment[features] = 0
    sae.W_dec[features] = direction
    sae.W_enc[features] = ENCODER_SHARE * norm * direction
    sae.b_enc[features] = 0
    sae.silent[features] = 0
    return features
