"""A decode step compiled ahead of time: traced once, kept in a directory, loaded in milliseconds.

`compiled` makes the library and checks it, `store` keeps it, `forward` runs it where `still` and
`caches` find nothing against it. Parameters and caches are inputs of the library, never in it.
"""
