"""One thread: the models are tiny, and two threads make sums depend on the split. Full precision, also in the processes
that tests start: what `dtype: auto` takes depends on the machine."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("SPARSETRAIN_DTYPE", "fp32")
if not os.path.exists("/proc/driver/nvidia/version"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which some libraries do

import torch

torch.set_num_threads(1)
