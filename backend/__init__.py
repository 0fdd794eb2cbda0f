"""BrownoutServe's inference engine and its Triton Python-backend adapter."""

import os

# Read by torch at its first allocation. With large pages the results of a prefill's layers, which are fresh memory each time,
# cost a few page faults instead of tens of thousands: a third of a prefill step on a CPU.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
