"""The emoji example: a small residual network with BatchNorm, one base and two specialists fine-tuned from it."""
