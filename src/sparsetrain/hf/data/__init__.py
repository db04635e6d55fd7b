"""Training data: text, conversations, labelled texts and images, as `datasets.Dataset` objects ready for a trainer.

A source is an embedded name (see `sparsetrain.hf.assets`), a file (text, JSONL, JSON, CSV, TSV, also packed as .gz, or
Parquet), a folder, a glob, a list of these, a folder written by `Dataset.save_to_disk`, or the name of a data set on
the hub. Nothing is dropped without being counted.
"""

from sparsetrain.hf.data.bundle import DataBundle as DataBundle
from sparsetrain.hf.data.chat import load_sft as load_sft
from sparsetrain.hf.data.classify import load_classify as load_classify
from sparsetrain.hf.data.images import load_images as load_images
from sparsetrain.hf.data.text import load_text as load_text
