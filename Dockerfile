# syntax=docker/dockerfile:1.7
# The images of the suite: targets gateway (no torch), worker-cpu and worker-cuda. The command selects the service:
# python -m services.gateway, services.audio, services.denoiser, services.vae or services.text. Base images are pinned by
# tag, packages by requirements.lock; pyproject.toml's extras list the packages of an image.

FROM python:3.11.14-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_PYTHON=/opt/avatar/bin/python
WORKDIR /src
RUN python -m venv --without-pip /opt/avatar
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY protos protos
COPY avatar avatar

FROM build AS build-gateway
RUN pip install --constraint requirements.lock '.[gateway]'

FROM build AS build-worker-cpu
RUN pip install --no-deps --constraint requirements.lock --index-url https://download.pytorch.org/whl/cpu torch \
    && pip install --constraint requirements.lock '.[worker]'

# PyPI's torch includes CUDA; the host provides the driver.
FROM build AS build-worker-cuda
RUN pip install --constraint requirements.lock '.[worker,float8]'

FROM python:3.11.14-slim-bookworm AS runtime
# malloc would map and unmap memory for each large message: 1.6 ms instead of 0.18 ms at 864 KB.
ENV MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_TOP_PAD_=67108864 \
    OMP_NUM_THREADS=1 \
    PATH=/opt/avatar/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    AVATAR_LISTEN=0.0.0.0:7000
WORKDIR /app
COPY services services
COPY deploy/deletion_cost.py deploy/
USER 10001:10001
EXPOSE 7000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --start-interval=2s --retries=3 \
    CMD ["python", "-m", "avatar.rpc.health", "127.0.0.1:7000"]

FROM runtime AS gateway
COPY --from=build-gateway /opt/avatar /opt/avatar
CMD ["python", "-m", "services.gateway"]

FROM runtime AS worker-cpu
COPY --from=build-worker-cpu /opt/avatar /opt/avatar
COPY models/tiny models/tiny

FROM runtime AS worker-cuda
COPY --from=build-worker-cuda /opt/avatar /opt/avatar
