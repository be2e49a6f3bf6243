"""What holds for every test: nobody's cache is touched, and nothing depends on how busy the machine is."""

from __future__ import annotations

import hypothesis
import pytest

from netlathe.pipeline.cache import FOLDER_VARIABLE

hypothesis.settings.register_profile(
    "any speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any speed")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path_factory.mktemp("cache")))
