"""Who differentiates a critic, and why: four passes where it can be captured, autograd otherwise.

The reader's path: ``choice`` (which of the two) -> ``planned`` (a step that is ready to run) -> ``guarded`` (what a
forward depends on) -> ``cost`` and ``checked`` (is it worth it, is it right) -> ``autograd`` (the other way).
"""
