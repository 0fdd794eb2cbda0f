# Triton Inference Server with this repository's models, on a GPU or without one:
#   docker build -t brownoutserve .
#   docker run --rm --gpus all --shm-size 1g -p 8000-8002:8000-8002 brownoutserve
# Triton and the model stubs exchange tensors through /dev/shm: give it 1 GiB (in Compose: shm_size: 1g). `docker stop` lets
# running requests end: the launcher takes at most 10 s, so allow it a little more with --stop-timeout 15.
FROM nvcr.io/nvidia/tritonserver:24.12-py3

WORKDIR /opt/brownoutserve
# Python 3.12 is the image's own, the one its Python stub is made for. torch is the CUDA build and brings the Triton
# kernels' compiler with it. flash-attn, which is optional, compiles from source and needs the CUDA toolkit.
COPY requirements.txt .
RUN python3 -m pip install --no-cache-dir --break-system-packages -r requirements.txt
COPY . .

EXPOSE 8000 8001 8002
ENTRYPOINT ["python3", "-m", "backend.serving.launch", "--host", "0.0.0.0"]
