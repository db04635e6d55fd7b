"""AxoNN's 4-D algorithm: weights cut over x and y, their pieces over z, copies over data (arXiv 2305.13525).

On `torch.distributed`; its cost model and simulator need no process group. See docs/grids.md.
"""
