"""Tests of diagpass: what must hold for models that were not written for it."""
