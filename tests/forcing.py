"""Fold gains that flashnorm refuses, to show that the refusal was needed."""

from dataclasses import replace

from flashnorm.graph.absorb import absorb
from flashnorm.graph.follow import follow
from flashnorm.graph.recording import record
from flashnorm.plan import Gain, Plan, Site
from flashnorm.planner import make_plan
from flashnorm.rewrite import apply_plan_


def forced_plans(model, inputs, nameless="") -> dict[str, Plan]:
    """Per refused gain a plan that folds it alone into whatever contracts with it.

    `nameless` stands for a gain whose convention is not known, so that the plan has no name for it.
    """
    graph = record(model, inputs)
    readers, _ = absorb(follow(graph), False)
    refused: dict[str, list[Site]] = {}
    for site in make_plan(graph).sites:
        gain = site.gain or (Gain(nameless) if nameless else None)
        if site.gain_state == "kept" and gain:
            consumers = tuple(readers.get(gain.parameter, ()))
            forced = replace(site, gain_state="folded", reason="", gain=gain, consumers=consumers)
            refused.setdefault(gain.parameter, []).append(forced)
    return {gain: Plan(tuple(sites)) for gain, sites in refused.items()}


def force_(model, example_inputs, gains) -> Plan:
    """Fold the named gains against all reasons, in place."""
    plans = forced_plans(model, example_inputs, gains[0] if len(gains) == 1 else "")
    plan = Plan(tuple(site for gain in gains for site in plans[gain].sites))
    apply_plan_(model, plan)
    return plan
