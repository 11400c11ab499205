"""Norm + linear as one operation: `y = act(s ⊙ (f(x) Wᵀ − μ u) + c) [+ residual]`.

`reference` is the meaning of the operation in a few lines of torch; `cpu` runs it at the speed of
memory; `dispatch` chooses a backend, says why, and shows every fallback; `ops` registers it for
torch.compile. Source: FlashNorm, arXiv 2407.09577.
"""
