# docker build -t vramplan . && docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 vramplan
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
# CPU builds of torch; empty takes the one on PyPI, with CUDA packages.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/vramplan
WORKDIR /src
COPY constraints.txt ./
COPY .ci/torch .ci/torch
RUN sh .ci/torch /opt/vramplan/bin/python "${TORCH_INDEX}"
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY calibration calibration
COPY estimator estimator
RUN /opt/vramplan/bin/pip install -c constraints.txt '.[postgres,redis]'

FROM python:${PYTHON_VERSION}-slim
RUN useradd --create-home --uid 10001 vramplan && install -d -o vramplan -g vramplan /var/lib/vramplan
COPY --from=build /opt/vramplan /opt/vramplan
# The root may be read-only: state and caches go to the volume, temporary files to /tmp.
ENV PATH=/opt/vramplan/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 VRAMPLAN_CACHE_DIR=/var/lib/vramplan
VOLUME /var/lib/vramplan
USER vramplan
WORKDIR /home/vramplan
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
# inside a container the loopback address would be out of reach; publish the port to 127.0.0.1 outside
CMD ["vramplan", "serve", "--host", "0.0.0.0", "--port", "8000"]
