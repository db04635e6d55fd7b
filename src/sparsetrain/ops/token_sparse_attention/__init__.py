"""TEMPORARY; helper 1 replaces this folder."""


def token_sparse_attention(*args, **kwargs):
    raise NotImplementedError
