"""The loop against the real control plane: what it sets, and that it fails safe."""

from __future__ import annotations

import io
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from backend.brownout.profile import Level
from backend.brownout.step_model import StepModel
from backend.errors import ConfigError
from backend.serving.protocol import replace_file
from controller.__main__ import _save as save
from controller.client import Refused
from controller.config import ControllerConfig
from controller.event_log import EventLog, read_events
from controller.laws import Predictive
from controller.loop import Controller, make_law
from controller.metrics import Metrics
from controller.replay import replay
from tests.controller.fake_plane import FakePlane

LEVELS = (
    Level("united", 0, 1.0, 1.0, 0.0, 20, 3, 1.0),
    Level("united", 8, 0.6, 0.5, 2.0, 20, 3, 0.8),
    Level("drop", 0, 0.7, 0.7, 3.0, 20, 3, 0.9),
    Level("united", 8, 0.2, 0.1, 9.0, 20, 3, 0.5),
)


@pytest.fixture
def plane(tmp_path: Path) -> FakePlane:
    return FakePlane(tmp_path)


@pytest.fixture
def make(plane: FakePlane) -> Callable[..., Controller]:
    def make(*, dry_run: bool = False, log: Path | None = None, plane: FakePlane = plane, **changes) -> Controller:
        options = {"ttft_slo_s": 0.5, "itl_slo_s": 0.05, "owner": "me", "stale_after_s": 0.05, "hand_back_after_s": 2.0}
        config = ControllerConfig(**{**options, **changes})
        law, extra = make_law(config, LEVELS, None)
        return Controller(config, plane, law, extra, events=EventLog(log), metrics=Metrics(), dry_run=dry_run)

    return make


def overload(plane: FakePlane, controller: Controller) -> None:
    """Enough turns to know the engine, then a queue that is too old."""
    for _ in range(3):
        plane.serve(0.1, 0.01)
        controller.turn(0.5)
    plane.queue(requests_waiting=5, waiting_tokens=400, oldest_waiting_s=0.6)
    controller.turn(0.5)


def in_force(plane: FakePlane) -> tuple[float, float]:
    settings = plane.plane.call({})["settings"]
    return settings["threshold_prefill"], settings["threshold_decode"]


def test_an_old_queue_is_dimmed_for_under_a_lease(plane: FakePlane, make: Callable) -> None:
    controller = make()
    overload(plane, controller)
    assert controller.mode == "control"
    assert sum(in_force(plane)) < 2
    assert plane.changes[-1]["owner"] == "me"
    controller.hand_back()
    assert in_force(plane) == (1.0, 1.0)


def test_a_dry_run_decides_and_sets_nothing(plane: FakePlane, make: Callable) -> None:
    controller = make(dry_run=True)
    overload(plane, controller)
    assert controller.mode == "dry_run"
    assert controller.turn(0.5).threshold_prefill < 1
    assert plane.changes == []


def test_frozen_telemetry_is_held_for_and_then_handed_back(plane: FakePlane, make: Callable) -> None:
    controller = make()
    overload(plane, controller)
    dimmed = in_force(plane)
    plane.frozen = True
    time.sleep(0.06)
    for _ in range(3):
        assert controller.turn(0.5).mode == "hold"
        assert in_force(plane) == dimmed
    assert controller.turn(0.5).mode == "handed_back"
    assert in_force(plane) == (1.0, 1.0)
    plane.frozen = False
    plane.queue(requests_waiting=0, waiting_tokens=0, oldest_waiting_s=0)
    event = controller.turn(0.5)
    assert (event.mode, event.resumed) == ("control", (1.0, 1.0))


def test_another_owners_lease_is_waited_for(plane: FakePlane, make: Callable) -> None:
    first, second = make(owner="first"), make(owner="second")
    overload(plane, first)
    for _ in range(2):
        event = second.turn(0.5)
    assert event.mode == "standby"
    assert "held by 'first'" in event.message
    first.hand_back()
    assert second.turn(0.5).mode == "control"
    assert plane.changes[-1]["owner"] == "second"
    second.hand_back()


def test_a_server_that_comes_back_is_controlled_again(tmp_path: Path, plane: FakePlane, make: Callable) -> None:
    controller = make()
    overload(plane, controller)
    plane.down = True
    assert controller.turn(0.5).mode == "unreachable"
    controller.hand_back()  # nothing is held, and nobody is there to give it to
    plane.down = False
    assert controller.turn(0.5).mode == "hold"
    event = controller.turn(0.5)
    assert (event.mode, event.resumed) == ("control", (1.0, 1.0))


def test_a_refusal_for_good_is_raised(tmp_path: Path, make: Callable) -> None:
    guarded = FakePlane(tmp_path, token="secret")
    controller = make(plane=guarded)
    with pytest.raises(Refused, match="token is missing"):
        overload(guarded, controller)


def test_a_model_that_cannot_be_dimmed_so_is_said_at_once(tmp_path: Path, make: Callable) -> None:
    plane = FakePlane(tmp_path)
    plane.row["ways"] = 0
    plane.publish()
    controller = make(plane=plane)
    controller.turn(0.5)
    with pytest.raises(Refused, match=r"has not what mechanism united needs; it can do piggyback, top_k, drop"):
        controller.turn(0.5)
    for usable in ({"mechanism": "drop"}, {"law": "off"}):
        other = make(plane=plane, **usable)
        other.turn(0.5)
        assert other.turn(0.5).mode == "control"
        other.hand_back()


def test_a_recorded_run_replays_to_the_same_decisions(plane: FakePlane, make: Callable, tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    controller = make(log=log)
    overload(plane, controller)
    plane.queue(requests_waiting=0, waiting_tokens=0, oldest_waiting_s=0)
    for _ in range(5):
        controller.turn(0.25)
    with open(log, "ab") as file:
        file.write(b'{"time_s": 1')  # cut off by a crash
    law, _ = make_law(ControllerConfig(ttft_slo_s=0.5, itl_slo_s=0.05), (), None)
    out = io.StringIO()
    summary = replay(read_events(log), law, 0.05, out)
    assert summary["turns"] == len(out.getvalue().splitlines()) == 9
    assert summary["differing"] == 0
    assert summary["mean_threshold_prefill"] < 1
    other, _ = make_law(ControllerConfig(ttft_slo_s=0.5, itl_slo_s=0.05, law="off"), (), None)
    assert replay(read_events(log), other, 0.05, out)["differing"] > 0


def test_a_full_disk_costs_events_and_nothing_else(
    plane: FakePlane, make: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The controller goes on and says so once; what can be read stays so, also if a line had room in part."""
    controller = make(log=tmp_path / "events.jsonl")
    controller.turn(0.5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "events.jsonl").stat().st_size + 20, limits[1]))
        for _ in range(2):
            assert controller.turn(0.5).mode in ("hold", "control")
        with pytest.raises(OSError, match="too large"):
            replace_file(tmp_path / "model", b"x" * 10**6)
        save(StepModel(), Path("/no/such/folder/model"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    controller.turn(0.5)
    assert len(list(read_events(tmp_path / "events.jsonl"))) == 2
    assert caplog.text.count("the event log") == caplog.text.count("the step model") == 1
    assert [path.name for path in tmp_path.glob(".model*")] == []


def test_a_log_of_something_else_is_a_named_error(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text('{"a": 1}\n{}\n')
    with pytest.raises(ConfigError, match="line 1, is not an event"):
        list(read_events(file))


@pytest.mark.parametrize(
    ("changes", "floors", "extra"),
    [
        ({"max_quality_loss": 5.0}, (0.6, 0.5), {"mechanism": "united", "way": 8}),
        ({"max_quality_loss": 50.0}, (0.2, 0.1), {"mechanism": "united", "way": 8}),
        ({"max_quality_loss": 5.0, "mechanism": "drop"}, (0.7, 0.7), {"mechanism": "drop", "way": 0}),
        ({"max_quality_loss": 1.0}, (1.0, 1.0), {"mechanism": "united", "way": 0}),
        ({"min_threshold_decode": 0.3, "way": 4}, (0.0, 0.3), {"way": 4}),
    ],
)
def test_the_quality_budget_bounds_dimming(changes: dict, floors: tuple[float, float], extra: dict) -> None:
    law, chosen = make_law(ControllerConfig(ttft_slo_s=1, itl_slo_s=1, **changes), LEVELS, None)
    assert isinstance(law, Predictive)
    assert (law.limits.min_threshold_prefill, law.limits.min_threshold_decode) == floors
    assert chosen == extra


def test_engines_count_on_no_deeper_dimming_than_either_phase_allows(make, plane: FakePlane) -> None:
    overload(plane, make(min_threshold_prefill=0.2, min_threshold_decode=0.7))
    assert plane.changes and {change["threshold_floor"] for change in plane.changes} == {0.7}


def test_a_quality_budget_without_levels_is_an_error() -> None:
    with pytest.raises(ConfigError, match="max_quality_loss needs the levels"):
        make_law(ControllerConfig(ttft_slo_s=1, itl_slo_s=1, max_quality_loss=5), (), None)
