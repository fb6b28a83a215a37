"""Kernels of our own, where libraries have none, and the choice between kernels by measurement."""
