# Triton Inference Server with this repository's models and the controller beside it, on a GPU or without one:
#   docker build -t brownoutserve .
#   docker run --rm --gpus all --shm-size 1g -p 8000-8003:8000-8003 brownoutserve
# As `make serve`: what follows the image's name are the server's flags, after a `--` the controller's, such as
#   docker run … brownoutserve -- --ttft-slo 0.5 --itl-slo 0.05
# Triton and the model stubs exchange tensors through /dev/shm: give it 1 GiB (in Compose: shm_size: 1g). `docker stop` lets
# running requests end: that takes at most 15 s, so allow a little more with --stop-timeout 20.
#
# Release 26.09 (Ubuntu 24.04 with Python 3.12; CUDA 13.4) is the newest known when this was written. NVIDIA's security bulletins
# ask for 25.07 or later (Python backend, CVE-2025-23319), 26.03 or later (authentication bypass, CVE-2026-24207) and 26.07 or
# later (bulletin 5875). GPUs need driver 580 or later, the first for CUDA 13, of which torch's build is, too.
FROM nvcr.io/nvidia/tritonserver:26.09-py3

RUN useradd --create-home brownoutserve
WORKDIR /opt/brownoutserve
# A virtual environment, so that pip never has to replace packages that apt owns. It is of the image's own Python, which the
# stub is made for, and first on PATH, where the stub finds its packages; pip from outside, as the image may lack ensurepip.
# torch is the CUDA build and brings the Triton kernels' compiler with it. flash-attn, which is optional, compiles from source
# and needs the CUDA toolkit.
COPY requirements.txt .
RUN python3 -m venv --without-pip /opt/venv \
    && python3 -m pip --python /opt/venv/bin/python3 install --no-cache-dir -r requirements.txt
ENV PATH=/opt/venv/bin:$PATH
COPY --chown=brownoutserve . .
# Nothing needs root; what is mounted must be readable for this user. The CPU kernels are compiled for the processor of the
# building machine, beside their sources: that folder is the user's, because numba reads only where it may write. On another
# type of processor the first start compiles them anew; with a read-only root file system set NUMBA_CACHE_DIR to a volume.
USER brownoutserve
RUN python3 -m backend.kernels.cpu.warm_up

ENV CONTROLLER_METRICS_HOST=0.0.0.0
EXPOSE 8000 8001 8002 8003
ENTRYPOINT ["python3", "-m", "controller.serve", "--host", "0.0.0.0"]
