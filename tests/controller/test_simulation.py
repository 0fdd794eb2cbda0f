"""The laws in the loop, against a queueing model of the engine whose step times they do not know."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from controller.laws import Limits, Off, Predictive, Salc
from tests.controller.simulate import SHAPES, Job, Outcome, Plant, Simulation, poisson_jobs

PLANT = Plant(max_running=256, max_batch_tokens=512)
PROMPT, OUTPUT = 200, 100
CAPACITY_RPS = PLANT.capacity_rps(PROMPT, OUTPUT, 0.06)
END_S = 45.0


def bursty(shape: str) -> list[Job]:
    base = 0.7 * CAPACITY_RPS
    rate = SHAPES[shape](base, END_S)
    return poisson_jobs(rate, END_S, max_rate=3 * base, prompt_tokens=PROMPT, output_tokens=OUTPUT, seed=1)


def steady(share: float, until_s: float) -> list[Job]:
    rate = share * CAPACITY_RPS
    return [Job(i / rate, PROMPT, OUTPUT) for i in range(int(rate * until_s))]


@functools.cache
def slo() -> tuple[float, float]:
    """Twice the P90 at base load with full quality: TTFT, inter-token latency."""
    base = 0.7 * CAPACITY_RPS
    jobs = poisson_jobs(lambda _: base, END_S, max_rate=base, prompt_tokens=PROMPT, output_tokens=OUTPUT, seed=9)
    calm = Simulation(PLANT, Off(Limits(9, 9))).run(jobs, END_S)
    return 2 * float(np.quantile(calm.ttft_s, 0.9)), 2 * float(np.quantile(calm.itl_s, 0.9))


def violations(outcome: Outcome) -> float:
    return sum(outcome.violations(*slo()))


@pytest.mark.parametrize("shape", SHAPES)
def test_predictive_violates_less_than_salc_for_the_same_quality(shape: str) -> None:
    """The paper's law dims later and less; for the same mean threshold it is aimed at a share of the SLO."""
    jobs = bursty(shape)
    ours = Simulation(PLANT, Predictive(Limits(*slo())), seed=1).run(jobs, END_S)
    salc = []
    for aim in (0.5, 0.7, 0.85, 1.0):
        law = Salc(Limits(aim * slo()[0], aim * slo()[1]))
        salc.append(Simulation(PLANT, law, seed=1).run(jobs, END_S))
    assert violations(ours) < 0.5 * violations(salc[-1])
    thetas = [run.mean_theta for run in salc]
    assert thetas == sorted(thetas)
    assert thetas[0] <= ours.mean_theta <= thetas[-1]
    assert violations(ours) < 0.8 * np.interp(ours.mean_theta, thetas, [violations(run) for run in salc])


@pytest.mark.parametrize("share", [0.6, 1.3, 1.5])
def test_a_constant_load_settles(share: float) -> None:
    outcome = Simulation(PLANT, Predictive(Limits(0.5, 0.1)), seed=1).run(steady(share, 30), 30)
    thetas = [(d.threshold_prefill + d.threshold_decode) / 2 for now, d in outcome.decisions if now > 15]
    assert np.quantile(thetas, 0.9) - np.quantile(thetas, 0.1) < 0.15
    ttft, itl = outcome.violations(0.5, 0.1)
    assert max(ttft, itl) < 0.1
    if share < 1:
        assert min(thetas) == 1.0


def test_far_beyond_capacity_early_refusal_keeps_the_service_useful() -> None:
    """Requests per second that finish within the objectives: at three times the capacity no fewer than at any load."""
    plant, limits, span_s = Plant(), Limits(0.5, 0.12), 20.0
    runs = {}
    for share in (1.0, 2.0, 3.0):
        rate = share * CAPACITY_RPS
        jobs = poisson_jobs(
            lambda _, rate=rate: rate, span_s, max_rate=rate, prompt_tokens=PROMPT, output_tokens=OUTPUT, seed=3
        )
        runs[share] = Simulation(plant, Predictive(limits), shed_ttft_s=0.5, seed=1).run(jobs, span_s)
    without = Simulation(plant, Predictive(limits), seed=1).run(jobs, span_s)
    goodput = {share: run.goodput_rps(0.5, 0.12, span_s) for share, run in runs.items()}
    assert goodput[3.0] >= 0.9 * max(goodput.values())
    assert goodput[3.0] > 1.5 * without.goodput_rps(0.5, 0.12, span_s)
    assert len(runs[1.0].refused_after_s) <= 3
    assert len(runs[3.0].refused_after_s) > 20


def test_where_dimming_is_not_enough_fewer_run_and_those_are_in_time() -> None:
    """With nothing or little to dim, early refusal alone lets so many run at once that no one's tokens are in time."""
    itl_s, span_s = 0.06, 60.0
    limits = Limits(0.5, itl_s, 0.9, 0.9)
    held, free = {}, {}
    for share in (1.0, 2.0, 3.0):
        rate = share * CAPACITY_RPS
        jobs = poisson_jobs(
            lambda _, rate=rate: rate, span_s, max_rate=rate, prompt_tokens=PROMPT, output_tokens=OUTPUT, seed=3
        )
        for runs, hold_itl_s in ((held, itl_s), (free, None)):
            simulation = Simulation(PLANT, Predictive(limits), shed_ttft_s=0.5, hold_itl_s=hold_itl_s, seed=1)
            runs[share] = simulation.run(jobs, span_s).goodput_rps(0.5, itl_s, span_s)
    assert held[3.0] >= 0.9 * max(*held.values(), *free.values())
    assert free[3.0] < 0.1 * held[3.0]


@pytest.mark.parametrize("law", [Salc, Predictive])
def test_full_quality_comes_back_after_a_burst(law: type) -> None:
    jobs = steady(2.0, 10) + [Job(job.arrival_s + 10, job.prompt_tokens, job.output_tokens) for job in steady(0.3, 40)]
    outcome = Simulation(PLANT, law(Limits(0.5, 0.1)), seed=1).run(jobs, 50)
    dimmest = min(d.threshold_prefill + d.threshold_decode for now, d in outcome.decisions if now < 15)
    assert dimmest < 1.7
    last = outcome.decisions[-1][1]
    assert last.threshold_prefill == last.threshold_decode == 1.0
