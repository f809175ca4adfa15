# Images of the server, one target for each kind of machine:
#   docker build --target cpu -t realtide:cpu .
#   docker build --target gpu -t realtide:gpu .
# docs/operations.md says how to run them (no root, read-only root file system).

# Every stage starts from this. The digest decides, the tag is for people; renew both together.
ARG PYTHON_BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${PYTHON_BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# The environment that ships has no pip; another one installs into it. Only wheels: nothing is compiled here either.
RUN python3 -m venv /opt/build && python3 -m venv --without-pip /opt/venv
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY realtide realtide
COPY clients/python/realtide_client clients/python/realtide_client
RUN /opt/build/bin/pip wheel --no-deps --wheel-dir /wheels .

FROM build AS build-cpu
RUN wheel="$(echo /wheels/*.whl)" \
    && /opt/build/bin/pip --python /opt/venv/bin/python install --only-binary=:all: "${wheel}[cpu]"

FROM build AS build-gpu
RUN wheel="$(echo /wheels/*.whl)" \
    && /opt/build/bin/pip --python /opt/venv/bin/python install --only-binary=:all: "${wheel}[gpu]"

FROM ${PYTHON_BASE} AS runtime
# A number, because Kubernetes checks runAsNonRoot without looking a name up.
RUN groupadd --gid 10001 realtide \
    && useradd --uid 10001 --gid realtide --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin realtide
# Bundles are looked for in ./models; .dockerignore leaves their recipes out.
WORKDIR /opt/realtide
COPY models models
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 50051 9090
STOPSIGNAL SIGTERM
# For engines without probes of their own. Kubernetes asks grpc.health.v1 itself.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-m", "realtide.server.probe"]
ENTRYPOINT ["realtide"]
CMD ["serve", "--log-format", "json"]

FROM runtime AS gpu
COPY --from=build-gpu /opt/venv /opt/venv
# What the container toolkit of NVIDIA mounts into the container.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The last one is what a build without a target makes.
FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
