"""Law: whatever happens to a file after its stamp was taken, its stamp is another one; where that cannot be promised there is none."""

import os
import time
from pathlib import Path

import pytest

from adapterhub_lite import files
from adapterhub_lite.files import COARSE_SECONDS, FINE_SECONDS, file_stamp, settled_stamps


def test_a_change_of_one_bit_in_place_shows_at_once_whatever_the_times_say(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    for number in range(30):
        path.write_bytes(bytes([number]) * 8)
        before, (stamp,) = path.stat(), settled_stamps([path]) or ()
        path.write_bytes(bytes([number + 1]) * 8)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file_stamp(path) != stamp


class Clock:
    """A clock that stands still but for what is slept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: float) -> None:
        self.now, self.slept = now, 0.0
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        """Move on."""
        self.now += seconds
        self.slept += seconds


@pytest.mark.parametrize(
    ("changed", "ago", "waited"),
    [
        (1_700_000_000.25, 0.001, FINE_SECONDS - 0.001),
        (1_700_000_000.25, 1.0, 0.0),
        (1_700_000_000.0, 0.001, COARSE_SECONDS - 0.001),  # a filesystem that knows whole seconds
        (1_700_000_000.25, -3600.0, None),  # another machine's clock
    ],
)
def test_a_stamp_is_given_once_the_tick_of_its_change_is_over(
    changed: float, ago: float, waited: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = (1, 2, int(changed * 1e9), int(changed * 1e9))
    monkeypatch.setattr(files, "file_stamp", lambda path: stamp)
    clock = Clock(monkeypatch, changed + ago)
    found = settled_stamps([tmp_path])
    assert found == (None if waited is None else (stamp,))
    assert clock.slept == pytest.approx(waited or 0.0, abs=1e-6)


def test_files_that_change_all_the_time_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 1_700_000_000.5)
    monkeypatch.setattr(files, "file_stamp", lambda path: (1, 2, 0, int(clock.now * 1e9)))
    assert settled_stamps([tmp_path]) is None and settled_stamps([]) == ()
