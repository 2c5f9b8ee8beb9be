"""A core suite that was stopped: what is kept, what is run again, and that the figures are the same bits."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tcsae.evaluate import EvaluateConfig, Evaluation, core_checkpoint, core_suite, evaluate_subjects
from tcsae.evaluate import run as run_module
from tcsae.evaluate.core_replay import Replay
from tcsae.evaluate.heldout import Batch, HeldOut
from tcsae.evaluate.subjects import subject
from tcsae.evaluate.token_rows import read_token_rows
from tcsae.harvest.model import LanguageModel
from tcsae.store import ActivationStore
from tcsae.store.errors import Interrupted

from .conftest import HOOK
from .test_run import an_sae
from .test_token_rows import some_ids

Measure = Callable[..., Evaluation]
CHECKPOINT = f".replay-{HOOK}.safetensors"


class Killed(BaseException):
    """Stands for a kill: nothing catches it, so nothing is saved on its account."""


@pytest.fixture(params=["a store's documents", "rows of a file"])
def measure(
    request: pytest.FixtureRequest, tmp_path: Path, neox: LanguageModel, neox_store: ActivationStore
) -> Measure:
    """Run the core suite of some SAEs into a folder."""
    np.save(tmp_path / "rows.npy", some_ids())
    rows = read_token_rows(tmp_path / "rows.npy") if request.param == "rows of a file" else None

    def run(out: str, *names: str) -> Evaluation:
        config = EvaluateConfig(
            saes=(Path("sae"),),
            out=tmp_path / out,
            store=neox_store.path,
            tokens=None if rows is None else rows.path,
            suites=("core",),
            split="all",
            max_tokens=200,
            batch_size=4,
            n_bootstrap=100,
            device="cpu",
        )
        saes = [an_sae(name, alpha, neox) for name, alpha in (("a", 0.0), ("b", 1.0)) if name in names]
        subjects = [subject(sae, neox_store, where=sae.name) for sae in saes]
        return evaluate_subjects(subjects, neox_store, config, rows=rows, model=neox)

    return run


def interrupt_after(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let a Ctrl-C arrive in the middle of the batch that is ``number`` in count, from 1."""
    begun: list[Batch] = []
    add = Replay.add

    def interrupted(self: Replay, batch: Batch) -> None:
        begun.append(batch)
        if len(begun) == number:
            monkeypatch.setattr(Replay, "add", add)
            signal.raise_signal(signal.SIGINT)
        add(self, batch)

    monkeypatch.setattr(Replay, "add", interrupted)


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, error: type[BaseException]) -> list[Batch]:
    """Let the replay end with ``error`` before batch ``number``, counted from 0; the batches that were begun."""
    begun: list[Batch] = []
    add = Replay.add

    def counted(self: Replay, batch: Batch) -> None:
        if len(begun) == number:
            monkeypatch.setattr(Replay, "add", add)
            raise error
        begun.append(batch)
        add(self, batch)

    monkeypatch.setattr(Replay, "add", counted)
    return begun


def figures(evaluation: Evaluation, sae: str) -> tuple[Any, ...]:
    """Everything in an SAE's files that does not change from call to call."""
    body = json.loads((evaluation.out / "core" / f"{sae}.json").read_text())
    row = next(row for row in evaluation.rows if row.sae == sae)
    draws = {name: one.draws.tolist() for name, one in row.draws.items()}
    changing = ("eval_id", "datetime_epoch_millis")
    return {key: value for key, value in body.items() if key not in changing}, draws


def test_an_interrupted_replay_goes_on_at_its_next_batch_with_the_same_bits(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure("whole", "a", "b")
    interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        measure("stopped", "a", "b")
    assert (tmp_path / "stopped" / "core" / CHECKPOINT).is_file()
    begun = stop_at(monkeypatch, 99, Killed)
    resumed = measure("stopped", "a", "b")
    assert len(begun) == 1  # of three
    for sae in ("a-s0", "b-s0"):
        assert figures(resumed, sae) == figures(whole, sae)
    assert not (tmp_path / "stopped" / "core" / CHECKPOINT).exists()


def test_a_killed_replay_goes_on_from_the_last_minute(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_checkpoint, "SECONDS_BETWEEN", 0.0)
    stop_at(monkeypatch, 2, Killed)
    with pytest.raises(Killed):
        measure("stopped", "a", "b")
    begun = stop_at(monkeypatch, 99, Killed)
    measure("stopped", "a", "b")
    assert len(begun) == 1


def test_the_replay_of_several_serves_one_of_them_and_none_that_was_not_in_it(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = measure("alone", "b")
    interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        measure("stopped", "a", "b")
    begun = stop_at(monkeypatch, 99, Killed)
    assert figures(measure("stopped", "b"), "b-s0") == figures(alone, "b-s0")
    assert len(begun) == 1
    interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        measure("other", "a")
    begun = stop_at(monkeypatch, 99, Killed)
    measure("other", "a", "b")
    assert len(begun) == 3


def test_what_is_written_is_not_measured_again_and_a_finished_replay_is_not_run_again(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = core_suite.core_result
    calls: list[int] = []

    def second_is_stopped(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return found(*args, **kwargs)

    monkeypatch.setattr(core_suite, "core_result", second_is_stopped)
    with pytest.raises(Interrupted):
        measure("stopped", "a", "b")
    assert (tmp_path / "stopped" / "core" / "a-s0.json").is_file()
    begun = stop_at(monkeypatch, 0, Killed)
    resumed = measure("stopped", "a", "b")
    assert begun == []
    assert len(calls) == 3
    monkeypatch.undo()
    assert figures(resumed, "b-s0") == figures(measure("whole", "a", "b"), "b-s0")


def test_a_call_stopped_after_its_last_result_leaves_a_state_that_the_next_call_removes(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_checkpoint, "SECONDS_BETWEEN", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "remove_states", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            measure("stopped", "a", "b")
    state = tmp_path / "stopped" / "core" / CHECKPOINT
    assert state.is_file()
    monkeypatch.setattr(core_checkpoint, "SECONDS_BETWEEN", 1e9)
    measure("stopped", "a")
    assert state.is_file()  # b's result is not what this call asks for
    measure("stopped", "a", "b")
    assert not state.exists()


def test_a_damaged_checkpoint_costs_the_time_and_nothing_else(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure("whole", "a")
    path = tmp_path / "stopped" / "core" / CHECKPOINT
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK\x03\x04 not an archive")
    begun = stop_at(monkeypatch, 99, Killed)
    assert figures(measure("stopped", "a"), "a-s0") == figures(whole, "a-s0")
    assert len(begun) == 3


def test_a_checkpoint_of_an_older_version_costs_the_time_and_nothing_else(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure("whole", "a")
    with monkeypatch.context() as patch:
        patch.setattr(core_checkpoint, "FORMAT", core_checkpoint.FORMAT - 1)
        interrupt_after(patch, 2)
        with pytest.raises(Interrupted):
            measure("stopped", "a")
    assert (tmp_path / "stopped" / "core" / CHECKPOINT).is_file()
    begun = stop_at(monkeypatch, 99, Killed)
    assert figures(measure("stopped", "a"), "a-s0") == figures(whole, "a-s0")
    assert len(begun) == 3


def test_a_ctrl_c_while_the_checkpoint_is_written_leaves_the_last_one_and_goes_on_from_it(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure("whole", "a", "b")
    monkeypatch.setattr(core_checkpoint, "SECONDS_BETWEEN", 0.0)
    write, written = core_checkpoint.write_atomically, []

    def second_is_stopped(path: Path, content: bytes) -> None:
        if len(written) == 1:
            # the first only asks the replay to stop at its batch's end, the second does not wait
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        written.append(content)
        write(path, content)

    monkeypatch.setattr(core_checkpoint, "write_atomically", second_is_stopped)
    with pytest.raises(Interrupted):
        measure("stopped", "a", "b")
    assert (tmp_path / "stopped" / "core" / CHECKPOINT).read_bytes() == written[0]
    monkeypatch.setattr(core_checkpoint, "write_atomically", write)
    begun = stop_at(monkeypatch, 99, Killed)
    resumed = measure("stopped", "a", "b")
    assert len(begun) == 2
    for sae in ("a-s0", "b-s0"):
        assert figures(resumed, sae) == figures(whole, sae)


def test_a_replay_that_goes_on_takes_what_its_batches_share_from_the_batch_that_it_came_from(
    neox: LanguageModel, neox_store: ActivationStore
) -> None:
    # In a model of a real one's size rows of another length give other last bits, so the row itself is looked at.
    batches = HeldOut(neox_store, HOOK, "all").batches(400, 2, 0)
    longest = batches[0].keep.shape[1]
    n_done = next(at for at, batch in enumerate(batches) if batch.keep.shape[1] < longest)
    mean = torch.linspace(-1, 1, neox_store.d_model)

    def replay() -> Replay:
        return Replay(neox, HOOK, mean, [an_sae("a", 1.0, neox)], neox_store.n_documents)

    whole, half, rest = replay(), replay(), replay()
    for batch in batches:
        whole.add(batch)
    for batch in batches[:n_done]:
        half.add(batch)
    rest.restore(half.state(), [0])
    rest.share_again(batches)
    for batch in batches[n_done:]:
        rest.add(batch)
    assert whole.state().keys() == rest.state().keys()
    for name, array in whole.state().items():
        assert np.array_equal(array, rest.state()[name], equal_nan=True), name
    for name, ablation in whole._ablations.items():
        expected, got = ablation.shared, rest._ablations[name].shared
        assert expected is not None
        assert got is not None
        assert torch.equal(expected, got)
