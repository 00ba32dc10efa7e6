# The worker image. Two targets: `cpu` (small) and `gpu` (CUDA runtime from the PyTorch image).
# docker build -f docker/worker.Dockerfile --target cpu -t penstock-worker .
FROM python:3.12-slim AS cpu
# On a machine without CUDA, an index that serves CPU builds of torch saves gigabytes: --build-arg TORCH_INDEX=<url>
ARG TORCH_INDEX=""
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
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
USER penstock
# exec form: SIGTERM reaches the worker, which drains.
ENTRYPOINT ["penstock"]
CMD ["worker"]

FROM pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime AS gpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY core core
COPY producer producer
COPY worker worker
# torch is the image's own, built for its CUDA.
RUN pip install '.[worker]' \
 && useradd --create-home --uid 10001 penstock \
 && mkdir /models && chown penstock /models
USER penstock
ENTRYPOINT ["penstock"]
CMD ["worker"]
