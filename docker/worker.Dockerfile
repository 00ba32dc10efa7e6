# The worker image. Two targets: `cpu` (small) and `gpu` (CUDA runtime from the PyTorch image).
# docker build -f docker/worker.Dockerfile --target cpu -t penstock-worker .
# The C kernels are compiled in stages of their own, on the image they will run on, so that no image needs a compiler
# and no worker compiles at its first start.
FROM python:3.12-slim AS cpu-kernels
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY core/penstock_core/__init__.py /src/penstock_core/__init__.py
COPY core/penstock_core/kernels /src/penstock_core/kernels
RUN cd /src && python -m penstock_core.kernels.build /kernels

FROM python:3.12-slim AS cpu
# On a machine without CUDA, an index that serves CPU builds of torch saves gigabytes: --build-arg TORCH_INDEX=<url>
ARG TORCH_INDEX=""
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The OpenMP runtime of the kernels.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY core core
COPY producer producer
COPY worker worker
RUN pip install --constraint constraints.txt '.[worker]' \
 && useradd --create-home --uid 10001 penstock \
 && mkdir /models && chown penstock /models
COPY --from=cpu-kernels /kernels /kernels
# Beside the installed sources, where it is looked for; not loading it fails the build.
RUN cd / && mv /kernels/*.so "$(python -c 'from penstock_core.kernels.build import SOURCES; print(SOURCES.parent)')" \
 && python -c 'from penstock_core.kernels.build import find_library as f; import ctypes; ctypes.CDLL(str(f()))'
USER penstock
# exec form: SIGTERM reaches the worker, which drains.
ENTRYPOINT ["penstock"]
CMD ["worker"]

FROM pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime AS gpu-kernels
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY core/penstock_core/__init__.py /src/penstock_core/__init__.py
COPY core/penstock_core/kernels /src/penstock_core/kernels
RUN cd /src && python -m penstock_core.kernels.build /kernels

FROM pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime AS gpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY core core
COPY producer producer
COPY worker worker
# torch is the image's own, built for its CUDA.
RUN pip install '.[worker]' \
 && useradd --create-home --uid 10001 penstock \
 && mkdir /models && chown penstock /models
COPY --from=gpu-kernels /kernels /kernels
RUN cd / && mv /kernels/*.so "$(python -c 'from penstock_core.kernels.build import SOURCES; print(SOURCES.parent)')" \
 && python -c 'from penstock_core.kernels.build import find_library as f; import ctypes; ctypes.CDLL(str(f()))'
USER penstock
ENTRYPOINT ["penstock"]
CMD ["worker"]
