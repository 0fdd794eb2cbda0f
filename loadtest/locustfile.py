"""Bursty loads with Locust, open loop.

locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --grpc 127.0.0.1:8001 --arrivals step:base=2,duration=60
    with the web UI; add --headless to do without, --processes 2 or --master / --worker for more senders, and
    HttpStreamUser, GrpcStreamUser or InferUser at the end for one interface only (default: all three in turn).
"""

import sys
from pathlib import Path

# Locust puts the folder of this file on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loadtest.shapes import OpenLoopShape
from loadtest.users import GrpcStreamUser, HttpStreamUser, InferUser

__all__ = ["GrpcStreamUser", "HttpStreamUser", "InferUser", "OpenLoopShape"]
