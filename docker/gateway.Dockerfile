# The gateway image: HTTP in front of the queue. No torch.
# docker build -f docker/gateway.Dockerfile -t penstock-gateway .
FROM python:3.12-slim
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY core core
COPY producer producer
COPY worker worker
RUN pip install --constraint constraints.txt '.[gateway]' \
 && useradd --create-home --uid 10001 penstock
USER penstock
EXPOSE 8000
# exec form: SIGTERM reaches the gateway, which lets open requests end.
ENTRYPOINT ["penstock"]
CMD ["gateway", "--host", "0.0.0.0"]
