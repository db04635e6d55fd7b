"""Operations: tensors in, tensors out. Each folder holds one op, its reference and its faster paths."""
