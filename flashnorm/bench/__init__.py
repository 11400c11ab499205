"""Speed and memory of a model as transformers runs it and as flashnorm does, checked first."""
