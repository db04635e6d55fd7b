"""One thread: the models are tiny, and two threads make sums depend on the split. Full precision, also in the processes
that tests start: what `dtype: auto` takes depends on the machine. Triton's kernels run through its interpreter."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("SPARSETRAIN_DTYPE", "fp32")

import torch

if not torch.cuda.is_available():  # Triton asks when it is first imported, and torch.compile may be who imports it
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Every Trainer collects garbage as it begins and ends; what the libraries and tests are made of is none, and
    looking through it takes longer than a tiny model's step."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or Triton's bindings say, as Python ends, that all of them have leaked
