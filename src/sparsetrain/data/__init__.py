"""Rows as plain values, without a Hugging Face library: read from files, split, generated, collated into batches."""
