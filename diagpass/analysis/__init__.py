"""FX graph -> cells and kinds -> dependencies -> waves."""
