"""The study's loads and its table."""

from loadtest.demo.burst import BurstShape, Ground, peak_rps
from loadtest.demo.study import StudyRun, markdown, schedules
from loadtest.quality import Quality
from loadtest.record import RequestRecord, Slo
from loadtest.results import RunInfo, summarize_run

SLO = Slo(ttft_s=0.5, itl_s=0.1)
GROUND = Ground(capacity_rps=30.0, tokens_per_s=3000.0, slo=SLO)


def _run(law: str, number: int, ttft_s: float) -> StudyRun:
    info = RunInfo(
        name="run", arrivals="", seed=0, arrivals_sha256="", slo=SLO, started_monotonic_s=0.0, started_at="",
        duration_s=2.0, planned_requests=1,
    )  # fmt: skip
    record = RequestRecord(
        id=0,
        protocol="grpc_stream",
        intended_start_s=0.0,
        start_s=0.0,
        responses=[(ttft_s, 1)],
        end_s=ttft_s,
        output_tokens=1,
    )
    quality = Quality(mean_loss_percent=number, max_loss_percent=4.0, measure="letter") if law != "off" else None
    return StudyRun(load="step", law=law, number=number, summary=summarize_run(info, [record]), quality=quality)


def test_every_load_goes_beyond_capacity_and_is_the_same_for_a_seed():
    loads = schedules(GROUND, BurstShape(), None, seed=5)
    assert set(loads) == {"step", "spike", "diurnal"}
    for _, schedule in loads.values():
        assert peak_rps(schedule) > GROUND.capacity_rps
        assert len(schedule.arrivals) / schedule.duration_s < GROUND.capacity_rps
    assert loads == schedules(GROUND, BurstShape(), None, seed=5)


def test_the_table_has_medians_and_spreads():
    runs = [_run("off", i, 0.9) for i in range(3)] + [_run("salc", i, 0.1 + i) for i in range(3)]
    table = markdown(runs)
    off, salc = table.splitlines()[2:]
    assert off.startswith("| step | off | 100.0% (100.0% … 100.0%) | – |") and off.endswith("| 0.0% (0.0% … 0.0%) |")
    assert salc.startswith("| step | salc | 100.0% (0.0% … 100.0%) |") and salc.endswith("| 1.0% (0.0% … 2.0%) |")
    assert len({line.count("|") for line in table.splitlines()}) == 1
