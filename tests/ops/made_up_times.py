"""Choosing by time as on a GPU, without one: every way runs once where the test runs, and its time is made up."""

from pathlib import Path

import pytest

from sparsetrain.core import fastest


@pytest.fixture
def made_up_ms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Way -> ms, to be filled by the test."""
    ms: dict[str, float] = {}
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(fastest, "_known", {})
    monkeypatch.setattr(fastest, "in_turns", lambda ways, _device: {name: [ms[name]] for name in ways})
    return ms
