"""Decoder layers, each written as transformers writes it, on tensors without content."""
