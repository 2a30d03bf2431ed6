# The pipeline on a CPU, and with `--gpus all` on the GPUs of a host with NVIDIA's container toolkit: torch's wheels bring
# CUDA along. docs/running.md says how to run it on a tree outside.
FROM python:3.11-slim

# git for DVC; a compiler for the kernels that torch.compile makes on GPUs.
RUN apt-get update && apt-get install -y --no-install-recommends git g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /vtp
COPY . .
RUN pip install --no-cache-dir -c constraints.txt -e .

# The copy has no history. A tree that is mounted over it brings its own setting.
RUN dvc config --local core.no_scm true

CMD ["dvc", "repro"]
