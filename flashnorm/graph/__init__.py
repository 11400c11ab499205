"""The data-flow graph of a model: recording it, finding its norms, following their gains."""
