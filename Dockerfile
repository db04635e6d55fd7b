# sparsetrain and what it needs, on an image with Python 3.11 to 3.13:
#   docker build -t sparsetrain . && docker run --rm -v "$PWD:/work" sparsetrain plan --model llama-3-8b --gpu 4090
# TORCH is what pip is told: add `--index-url` and an index of wheels without CUDA for an image gigabytes smaller, or
# leave it empty on a BASE that has torch (pytorch/pytorch).
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG TORCH="torch>=2.11"
RUN if [ -n "$TORCH" ]; then pip install --no-cache-dir $TORCH; fi
COPY pyproject.toml README.md LICENSE /src/
COPY src /src/src
RUN pip install --no-cache-dir "/src[trl]" && rm -rf /src && useradd --create-home trainer
USER trainer
WORKDIR /work
ENTRYPOINT ["sparsetrain"]
CMD ["--help"]
