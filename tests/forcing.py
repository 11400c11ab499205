"""Fold gains that flashnorm refuses, to show that the refusal was needed."""

from dataclasses import replace

from flashnorm.graph.absorb import absorb
from flashnorm.graph.follow import follow
from flashnorm.inspection import record
from flashnorm.plan import Gain, Plan, Site
from flashnorm.planner import make_plan
from flashnorm.rewrite import apply_plan_


def force_(model, example_inputs, gains) -> Plan:
    """Fold the named gains into whatever contracts with them, against all reasons, in place."""
    graph = record(model, example_inputs)
    flow = follow(graph)
    consumers, _ = absorb(flow, False)
    sites = []
    for site in make_plan(graph).sites:
        name = site.weight.parameter if site.weight else None
        if name in gains or (name is None and len(gains) == 1 and site.gain == "kept"):
            weight = site.weight or Gain(gains[0])
            sites.append(_forced(site, weight, tuple(consumers.get(weight.parameter, ()))))
    plan = Plan(tuple(sites))
    apply_plan_(model, plan)
    return plan


def _forced(site: Site, weight: Gain, consumers) -> Site:
    return replace(site, gain="folded", reason="", weight=weight, consumers=consumers)
