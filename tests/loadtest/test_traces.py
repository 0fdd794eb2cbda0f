"""Traces of every format read alike; wrong lines are named; scaling does what it says.

LOADTEST_TRACES names a folder with parts of the recorded traces that docs/loads.md lists: the first 3000 requests of Azure's
conversations, their busiest 15 minutes, and the first 2000 requests of Mooncake's. Without it their test is skipped.
"""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.errors import ConfigError
from loadtest.load_spec import build_schedule
from loadtest.traces import Scaling, TraceRow, read_trace, scale_trace

RECORDED = os.environ.get("LOADTEST_TRACES", "")

FORMATS = {
    "azure2023.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:50.5000000,20,5\r\n"
    "2023-11-16 18:15:46.2500000,10,4\r\n",
    "azure2024.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.250000+00:00,10,4\n"
    "2024-05-10 00:00:04.500000+00:00,20,5\n",
    "mooncake.jsonl": '{"timestamp": 1000, "input_length": 10, "output_length": 4, "hash_ids": [0]}\n\n'
    '{"timestamp": 5250, "input_length": 20, "output_length": 5, "hash_ids": [0, 1]}\n',
    "burstgpt.csv": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,10,4,14,x\n"
    "6,GPT-4,99,0,99,x\n9.25,GPT-4,20,5,25,x\n",
    "plain.csv": "\ufeffarrival_s,input_tokens,output_tokens,service\n0.5,10,4,chat\n4.75,20,5,code\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_read_alike(tmp_path, name):
    """Sorted, from the first request on; BurstGPT's failed request is left out."""
    path = tmp_path / name
    path.write_bytes(FORMATS[name].encode())
    assert read_trace(path) == [TraceRow(0.0, 10, 4), TraceRow(4.25, 20, 5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival_s,input_tokens,output_tokens\n0,1,2\n1,x,2\n", "line 3: invalid literal"),
        ("arrival_s,input_tokens,output_tokens\n0,1\n", "line 2: int() argument"),
        ("arrival_s,input_tokens,output_tokens\nnan,1,2\n", "line 2: times must be finite"),
        ("arrival_s,input_tokens,output_tokens\n0,-1,2\n", "line 2: times must be finite and token counts at least 0"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,2\n", "line 2: Invalid isoformat"),
        (
            '{"timestamp": 1, "input_length": 1, "output_length": 1}\n{"timestamp": 2}\n',
            "line 2: input_length is missing",
        ),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n{"times', "line 2: Input data was truncated"),
        ("when,how\n1,2\n", "known: TIMESTAMP,ContextTokens,GeneratedTokens; Timestamp,Model"),
        ("arrival_s,input_tokens,output_tokens\n", "has no request"),
    ],
)
def test_wrong_lines_are_named(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


ROWS = st.lists(st.tuples(st.floats(0, 1000), st.integers(0, 5000), st.integers(0, 5000)), min_size=1, max_size=40).map(
    lambda rows: [TraceRow(t - min(r[0] for r in rows), i, o) for t, i, o in sorted(rows)]
)


@given(rows=ROWS, time=st.floats(0.1, 3), rate=st.integers(1, 3), tokens=st.floats(0.01, 2), seed=st.integers(0, 9))
def test_scaled_traces_stay_within_their_bounds(rows, time, rate, tokens, seed):
    scaling = Scaling(time=time, rate=rate, tokens=tokens, max_input=100, max_output=50)
    schedule = scale_trace(rows, scaling, seed=seed)
    assert schedule == scale_trace(rows, scaling, seed=seed)
    assert len(schedule.arrivals) == rate * len(rows)
    times = [a.at_s for a in schedule.arrivals]
    assert times == sorted(times) and times[-1] <= schedule.duration_s + 1e-6
    assert all(1 <= a.input_tokens <= 100 and 1 <= a.output_tokens <= 50 for a in schedule.arrivals)


def test_time_and_tokens_scale_linearly():
    rows = [TraceRow(0.0, 100, 10), TraceRow(5.0, 200, 20), TraceRow(9.0, 300, 30)]
    schedule = scale_trace(rows, Scaling(start=1, duration=6, time=2, tokens=0.5), seed=0)
    assert [(a.at_s, a.input_tokens, a.output_tokens) for a in schedule.arrivals] == [(8.0, 100, 10)]
    assert schedule.duration_s == 12


def test_a_rate_below_one_keeps_that_share():
    rows = [TraceRow(float(i), 1, 1) for i in range(2000)]
    kept = len(scale_trace(rows, Scaling(rate=0.25), seed=0).arrivals)
    assert 400 < kept < 600


def test_a_specification_replays_a_trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_bytes(FORMATS["plain.csv"].encode())
    schedule = build_schedule(f"trace:{path},time=0.5,tokens=2,max_output=9")
    assert [(a.at_s, a.input_tokens, a.output_tokens) for a in schedule.arrivals] == [(0.0, 20, 8), (2.125, 40, 9)]
    with pytest.raises(ConfigError, match="unknown key 'speed'; allowed are start, duration, time, rate, tokens"):
        build_schedule(f"trace:{path},speed=2")


@pytest.mark.skipif(not RECORDED, reason="LOADTEST_TRACES names no folder with recorded traces")
@pytest.mark.parametrize(
    ("name", "requests"),
    [
        ("AzureLLMInferenceTrace_conv.head3000.csv", 3000),
        ("azure2023_conv_peak_15min.csv", 6419),
        ("mooncake_conversation.head2000.jsonl", 2000),
    ],
)
def test_recorded_traces_read_whole(name, requests):
    rows = read_trace(Path(RECORDED) / name)
    assert len(rows) == requests and rows[0].at_s == 0
    assert all(row.input_tokens > 0 for row in rows)
