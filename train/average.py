"""An exponential moving average of an SAE's weights, which can be what is saved."""

from __future__ import annotations

import torch
from torch import Tensor

from tcsae.train.resample import feature_parameters
from tcsae.train.sae.base import TrainableSAE


class WeightAverage:
    """Averages the parameters of one SAE over its steps, without the bias of where the average began.

        average_n = (1 - d) / (1 - d^n) * sum over i = 1..n of d^(n - i) * weights_i

    so after the first step it is the weights themselves (the correction that Adam makes to its moments).

    Parameters
    ----------
    sae
        whose parameters are averaged
    decay
        d: what the average keeps of itself at each step, 0-1, less than 1
    """

    def __init__(self, sae: TrainableSAE, decay: float) -> None:
        self._decay = decay
        self.tensors: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in sae.named_parameters()
        }
        """the average by the parameter's name; part of the checkpoint"""

    @torch.no_grad()
    def update(self, sae: TrainableSAE, n: int) -> None:
        """Take in the weights after step ``n``, counted from 1."""
        share = (1 - self._decay) / (1 - self._decay**n)
        for name, parameter in sae.named_parameters():
            self.tensors[name].lerp_(parameter, share)

    @torch.no_grad()
    def begin_anew(self, sae: TrainableSAE, features: Tensor) -> None:
        """Forget what these features were: their rows become the weights'."""
        for name in feature_parameters(sae):
            self.tensors[name][features] = sae.get_parameter(name)[features]

    @torch.no_grad()
    def give_to(self, sae: TrainableSAE) -> None:
        """Make the average the SAE's weights, with decoder rows of unit norm where the arm asks for them."""
        for name, parameter in sae.named_parameters():
            parameter.copy_(self.tensors[name])
        if sae.config.unit_norm_decoder:
            sae.W_dec.div_(torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True))
