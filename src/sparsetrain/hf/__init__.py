"""The edge: the only importer of transformers, peft, trl, accelerate and datasets."""
