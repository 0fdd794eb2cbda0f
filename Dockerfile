# Triton Inference Server with this repository's models and the controller beside it, on a GPU or without one:
#   docker build -t brownoutserve .
#   docker run --rm --gpus all --shm-size 1g -p 8000-8003:8000-8003 brownoutserve
# As `make serve`: what follows the image's name are the server's flags, after a `--` the controller's, such as
#   docker run … brownoutserve -- --ttft-slo 0.5 --itl-slo 0.05
# Triton and the model stubs exchange tensors through /dev/shm: give it 1 GiB (in Compose: shm_size: 1g). `docker stop` lets
# running requests end: that takes at most 15 s, so allow a little more with --stop-timeout 20.
FROM nvcr.io/nvidia/tritonserver:24.12-py3

WORKDIR /opt/brownoutserve
# Python 3.12 is the image's own, the one its Python stub is made for. torch is the CUDA build and brings the Triton
# kernels' compiler with it. flash-attn, which is optional, compiles from source and needs the CUDA toolkit.
COPY requirements.txt .
RUN python3 -m pip install --no-cache-dir --break-system-packages -r requirements.txt
COPY . .

ENV CONTROLLER_METRICS_HOST=0.0.0.0
EXPOSE 8000 8001 8002 8003
ENTRYPOINT ["python3", "-m", "controller.serve", "--host", "0.0.0.0"]
