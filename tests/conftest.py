"""What holds for every test: none of them touches the cache of whoever runs them, or of another test."""

from __future__ import annotations

import pytest

from netlathe.pipeline.cache import FOLDER_VARIABLE


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path_factory.mktemp("cache")))
