"""Choosing a torch device by name, alike in every command."""

from __future__ import annotations

import torch

from tcsae.store.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """A torch device by name; "auto" takes a GPU if there is one. Raises `ConfigError` if it is absent.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta makes tensors, but without values
    # What torch raises depends on the backend: an unknown name or a missing GPU, a build without CUDA, a backend
    # that has no such operation.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device: expected auto, cpu or a GPU that torch sees, got {name!r} ({reason}); try --device cpu"
        ) from error
    return device
