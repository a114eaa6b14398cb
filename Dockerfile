# syntax=docker/dockerfile:1.7
# The images of the suite: targets gateway and voice (no torch), worker-cpu and worker-cuda. The command selects the service:
# python -m services.gateway, services.audio, services.denoiser, services.vae, services.text or services.voice. Base images are pinned by
# tag, packages by requirements.lock; pyproject.toml's extras list the packages of an image.

FROM python:3.11.14-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_PYTHON=/opt/avatar/bin/python
RUN python -m venv --without-pip /opt/avatar
# The base image comes without the standard library's bytecode, and a read-only root would compile it at every start.
# Compiled here, so that no command runs in an image's own layers, where a build's mounts would leave empty files.
WORKDIR /usr/local/lib/python3.11
RUN python -m compileall -q -x 'site-packages|ensurepip|idlelib|lib2to3|pydoc_data|turtledemo' . \
    && mkdir /bytecode \
    && find . -path ./site-packages -prune -o -name '*.pyc' -exec cp --parents -t /bytecode {} +
WORKDIR /src
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY protos protos
# An empty package has the same dependencies, which a change of the code then does not install again.
RUN mkdir avatar && touch avatar/__init__.py

# dumb-init is process 1: the kernel gives it signals that it would keep from a Python process which has yet to set its
# handlers, so SIGTERM also ends a process that imports or loads weights.
FROM build AS build-gateway
RUN pip install --constraint requirements.lock dumb-init==1.2.5.post1 '.[gateway]'
COPY avatar avatar
RUN pip install --no-deps --force-reinstall .

FROM build AS build-voice
RUN pip install --constraint requirements.lock dumb-init==1.2.5.post1 '.[voice]'
COPY avatar avatar
RUN pip install --no-deps --force-reinstall .

FROM build AS build-worker-cpu
RUN pip install --no-deps --constraint requirements.lock --index-url https://download.pytorch.org/whl/cpu torch \
    && pip install --constraint requirements.lock dumb-init==1.2.5.post1 '.[worker]'
# 190 MB that only torch's own tests and building extensions need.
WORKDIR /opt/avatar/lib/python3.11/site-packages/torch
RUN rm -r bin/protoc* bin/test_* include test
WORKDIR /src
COPY avatar avatar
RUN pip install --no-deps --force-reinstall .

# PyPI's torch includes CUDA; the host provides the driver.
FROM build AS build-worker-cuda
RUN pip install --constraint requirements.lock dumb-init==1.2.5.post1 '.[worker]'
COPY avatar avatar
RUN pip install --no-deps --force-reinstall .

FROM python:3.11.14-slim-bookworm AS runtime
# malloc would map and unmap memory for each large message: 1.6 ms instead of 0.18 ms at 864 KB.
ENV MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_TOP_PAD_=67108864 \
    OMP_NUM_THREADS=1 \
    PATH=/opt/avatar/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    AVATAR_LISTEN=0.0.0.0:7000
COPY --from=build /bytecode /usr/local/lib/python3.11
WORKDIR /app
# Readable for the user below, whatever the umask of the checkout was.
COPY --chmod=755 services services
COPY --chmod=755 deploy/deletion_cost.py deploy/
# Beside them too, to be run as a file: neither site-packages nor the package then has to be imported.
COPY --chmod=755 avatar/rpc/health.py ./
USER 10001:10001
EXPOSE 7000
ENTRYPOINT ["dumb-init", "--"]
# Often, since it is cheap and other containers start after it; --start-interval is unknown to Debian 12's buildah.
HEALTHCHECK --interval=3s --timeout=5s --start-period=600s --retries=5 \
    CMD ["python", "-I", "-S", "health.py", "127.0.0.1:7000"]

FROM runtime AS gateway
COPY --from=build-gateway /opt/avatar /opt/avatar
CMD ["python", "-m", "services.gateway"]

FROM runtime AS voice
COPY --from=build-voice /opt/avatar /opt/avatar
CMD ["python", "-m", "services.voice"]

FROM runtime AS worker-cpu
COPY --from=build-worker-cpu /opt/avatar /opt/avatar
COPY --chmod=755 models/tiny models/tiny

FROM runtime AS worker-cuda
USER 0:0
# torch.compile needs a compiler, a folder to execute from, which outlives the container as a volume (/tmp is mounted
# noexec), and a name for the user.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 \
    && rm -r /var/lib/apt/lists/* \
    && install --directory --owner 10001 --group 10001 /compiled
ENV TORCHINDUCTOR_CACHE_DIR=/compiled/inductor TRITON_CACHE_DIR=/compiled/triton USER=avatar
USER 10001:10001
COPY --from=build-worker-cuda /opt/avatar /opt/avatar
