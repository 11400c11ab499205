"""Decode steps on a static cache as graphs of the device, captured once and replayed: `capture_`.

`forward` decides for each call, `arguments` and `caches` say what a graph is for, `graphs` makes
one, `products` are the linear layers that no norm computes. A graph reads and writes memory where
it was captured, so everything that could make it another step is looked at before each replay.
"""
