"""The GPU benchmark: `python -m benchmarks.gpu`. benchmarks/README.md says what it measures.

`supervise` watches a `worker`, which measures the pieces of a `schedule` within a `budget` and
keeps what it finds in a `store`; `handoff` is what both know. `correctness` says what may not be
timed; `operations` times norm + linear against `baselines`; `models` decodes, prefills and trains
in the ways of `variants`; `tables`, `plots` and `summary` show it all.
"""
