"""Models and programs that use diagpass and are no part of it; the models never import it."""
