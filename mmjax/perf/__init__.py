"""How fast can this computation be: FLOPs, memory, collectives, rooflines.

Nothing here runs a computation or knows a model: the modules read jaxprs,
optimised HLO and published figures of chips.
"""
