"""A plan settled by what is known of the stored weights: their values, and how they are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from flashnorm.algebra import can_carry, effective_gain, is_identity
from flashnorm.plan import BiasState, Gain, GainState, Plan, Site

NOT_CARRIED = (
    "its bias {} cannot be kept as β/g, because the gain is zero, or next to it, where the bias is "
    "not (E13)"
)
ALREADY_ONE = "its gain is one everywhere already: nothing to fold"


def with_values(plan: Plan, value_of: Callable[[str], Tensor | None]) -> Plan:
    """The plan that the values allow: nothing to fold where a gain is one everywhere already, and
    no gain folded that is zero where the bias it would carry is not (E13).

    `value_of` gives the value of a parameter where it is at hand.
    """
    settled: dict[tuple[Gain, str, BiasState], Callable[[Site], Site]] = {}

    def settle(site: Site) -> Site:
        assert site.gain is not None
        key = (site.gain, site.norm_bias, site.bias)
        if key not in settled:
            settled[key] = _settlement(*key, value_of)
        return settled[key](site)

    sites = tuple(settle(s) if s.gain_state == "folded" else s for s in plan.sites)
    changed = {c.parameter for s in sites for c in s.consumers}
    changed |= {centering.parameter for centering in plan.centerings}
    untied = tuple(pair for pair in plan.untied if changed & {*pair})
    return replace(plan, sites=sites, untied=untied)


def asked_values(plan: Plan) -> list[str]:
    """The parameters whose values `with_values` asks for."""
    sites = [site for site in plan.sites if site.gain_state == "folded"]
    names = [name for s in sites if s.gain for name in (s.gain.parameter, s.norm_bias) if name]
    return list(dict.fromkeys(names))


def _settlement(
    gain: Gain, norm_bias: str, bias: BiasState, value_of: Callable[[str], Tensor | None]
) -> Callable[[Site], Site]:
    """What the values of one gain and its bias do to the sites that have them."""
    value = value_of(gain.parameter)
    beta = value_of(norm_bias) if norm_bias else None
    if value is None or (norm_bias and beta is None):
        return lambda site: site
    moves_bias = bias == "folded" and beta is not None and bool((beta != 0).any())
    if is_identity(value, gain) and not moves_bias:
        return lambda site: _unfolded(site, "none", ALREADY_ONE)
    if bias == "carried" and beta is not None and not can_carry(beta, effective_gain(value, gain)):
        return lambda site: _unfolded(site, "kept", NOT_CARRIED.format(norm_bias))
    return lambda site: site


def without_folds(plan: Plan, reason: str) -> Plan:
    sites = tuple(
        _unfolded(s, "kept", reason) if s.gain_state == "folded" else s for s in plan.sites
    )
    sites = tuple(_uncentered(s, reason) for s in sites)
    return replace(plan, sites=sites, untied=(), centerings=(), entries=())


def _uncentered(site: Site, reason: str) -> Site:
    if site.centering != "folded":
        return site
    return replace(site, centering="kept", centering_reason=reason)


def _unfolded(site: Site, state: GainState, reason: str) -> Site:
    bias: dict[str, Any] = (
        {"bias": "kept", "bias_reason": "its gain is not folded"} if site.norm_bias else {}
    )
    return replace(site, gain_state=state, reason=reason, consumers=(), **bias)
