"""A norm that divides by the mean of |x|: all that the package has to be told of it.

x̂ = s x,   s = 1 / (mean|x| + ε),   dx = s (d − sign(x̂) ⟨d, x̂⟩/n)
"""

from flashnorm.kernels.norms import NormKind


def statistics(x, eps):
    return 1 / (x.abs().mean(-1, keepdim=True) + eps), None


def hat(x, scale, mean, alpha):
    return x * scale


def backward(d, hat, scale, alpha):
    return (d - hat.sign() * (d * hat).mean(-1, keepdim=True)) * scale


MEAN = NormKind(
    "absmean", statistics=statistics, hat=hat, backward=backward, statistic="absolute", undone=True
)
