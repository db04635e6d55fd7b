"""Operations: tensors in, tensors out. Each folder holds one op, its reference and its faster paths.

A folder's `torch.py` is its backend in plain PyTorch. Importing it binds the name `torch` in the folder's `__init__`,
so that file takes what it needs from PyTorch by name (`from torch import Tensor`) and never says `import torch`.
"""
