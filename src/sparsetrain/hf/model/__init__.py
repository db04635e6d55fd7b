"""What transformers models are: their anatomy, their attention, how they are made, read and written."""
