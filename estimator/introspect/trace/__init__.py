"""The real training step on tensors without content: transformers, PEFT, autograd and the optimizer run, and every allocation is seen."""
