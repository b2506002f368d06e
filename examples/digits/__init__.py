"""The digits example: a small Compact Convolutional Transformer, one base and two specialists fine-tuned from it."""
