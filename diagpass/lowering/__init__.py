"""Kinds -> batched kinds, weight stacks and the emitted wavefront graph."""
