# For CPUs:         docker build -t advanced-dpo .
# For NVIDIA GPUs:  docker build -t advanced-dpo --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 .
#
#   docker run --rm -v "$PWD:/work" advanced-dpo data pairs.jsonl
#   docker run --rm --gpus all -v "$PWD:/work" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" advanced-dpo \
#       --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl --output_dir runs/dpo
ARG BASE=python:3.11-slim
FROM ${BASE}

# A C compiler for torch.compile and Triton; Python where the base has none.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ $(command -v python3 > /dev/null || echo python3-dev python3-venv) \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

# The libraries first: they change seldom, and a change of the code does not install them again.
COPY requirements.txt /src/
RUN pip install --no-cache-dir -r /src/requirements.txt
COPY setup.py pyproject.toml README.md LICENSE /src/
COPY utils /src/utils
COPY examples /src/examples
RUN pip install --no-cache-dir --no-build-isolation --no-deps /src

WORKDIR /work
ENTRYPOINT ["dpo-train"]
CMD ["--help"]
