"""Our SAE folders in SAELens itself, where one is installed: the same features and the same reconstructions.

sae-lens asks for an older transformer_lens than tcsae does, so it usually sits in an environment of its own:

    TCSAE_SAELENS_PYTHON=.../bin/python pytest tests/train/test_saelens_installed.py
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tcsae.train import SAE, save_sae

PYTHON = os.environ.get("TCSAE_SAELENS_PYTHON") or (
    sys.executable if importlib.util.find_spec("sae_lens") else None
)

pytestmark = pytest.mark.skipif(
    PYTHON is None,
    reason="sae-lens is not installed; TCSAE_SAELENS_PYTHON may name a Python that has it",
)

D_IN, D_SAE, ROWS = 48, 192, 256


def example(architecture: str) -> SAE:
    """Weights of the size that a trained SAE has on raw activations: not of norm one, and far from zero mean."""
    draw = torch.Generator().manual_seed(0)
    extra: dict[str, Any] = {
        "standard": {},
        "topk": {"k": 8},
        "jumprelu": {"threshold": 2 * torch.rand(D_SAE, generator=draw)},
    }[architecture]
    return SAE(
        architecture=architecture,  # type: ignore[arg-type]
        W_enc=torch.randn(D_IN, D_SAE, generator=draw) / 7,
        b_enc=torch.randn(D_SAE, generator=draw),
        W_dec=3 * torch.randn(D_SAE, D_IN, generator=draw),
        b_dec=20 * torch.randn(D_IN, generator=draw),
        block_size=40,
        name=f"{architecture}-s0",
        metadata={"hook_name": "blocks.3.hook_resid_post", "tcsae": {"arm": architecture}},
        **extra,
    )


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_saelens_computes_what_we_compute_from_the_same_folder(tmp_path: Path, architecture: str) -> None:
    assert PYTHON is not None
    sae = example(architecture)
    save_sae(sae, tmp_path / "sae")
    draw = torch.Generator().manual_seed(1)
    x = sae.b_dec + 5 * torch.randn(ROWS, D_IN, generator=draw)
    f = sae.encode(x)
    assert 0 < int((f != 0).sum()) < f.numel()
    save_file({"x": x, "f": f}, tmp_path / "given.safetensors")
    script = Path(__file__).with_name("load_in_saelens.py")
    names = [str(tmp_path / name) for name in ("sae", "given.safetensors", "answer.safetensors")]
    ran = subprocess.run([PYTHON, "-P", str(script), *names], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    with safe_open(names[2], "pt") as answer:
        theirs = {name: answer.get_tensor(name) for name in answer.keys()}  # noqa: SIM118  # not a mapping
        about = answer.metadata()
    assert about == {
        "architecture": architecture,
        "hook_name": "blocks.3.hook_resid_post",
        "arm": architecture,
    }
    ours = {"encode": f, "decode": sae.decode(f), "forward": sae(x)}
    assert theirs.keys() == ours.keys()
    for name, expected in ours.items():
        # both add in float32, in another order: some 1e-6 of the largest value
        tolerance = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(theirs[name], expected, rtol=0, atol=tolerance, msg=f"{name} differs")
