"""What runs a plan: stacked weights and compiled kinds."""
