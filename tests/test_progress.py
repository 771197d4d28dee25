"""What a run shows without a terminal."""

from __future__ import annotations

import pytest

from fastvae import progress


def test_the_remaining_time_leaves_out_what_was_compiled_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[-1])
    row = {"negative_elbo": 30.0, "nll": 28.0, "kl": 2.0}
    with progress.TrainingProgress(0, 400) as shown:
        # 100 s of compilation, then a second for 100 steps
        for step, now in ((100, 100.0), (200, 101.0), (400, 103.0)):
            clock.append(now)
            shown.report(step, step / 100, row, 1000.0)
    first, second, last = capsys.readouterr().out.splitlines()
    assert "ETA" not in first
    assert second.endswith("ETA 0:02")
    assert "ETA" not in last
