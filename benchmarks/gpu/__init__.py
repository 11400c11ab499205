"""The GPU benchmark: `python -m benchmarks.gpu`. benchmarks/README.md says what it measures.

`__main__` runs the `stages` within a `budget` and keeps what they find in a `store`; `correctness`
comes first and says what may not be timed; `operations` times norm + linear against `baselines`;
`models` decodes, prefills and trains; `tables` and `plots` show it all.
"""
