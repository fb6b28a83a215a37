"""The command line ``diagpass`` (extra ``cli``): explain, verify, bench, demo.

    app.py      the commands, their options and exit codes
    target.py   MODULE:FACTORY -> a model and its inputs
    checks.py   verify: sequential against wavefront in figures
    timing.py   bench: the model against its baselines
    sample.py   the demo's model

Results go to standard output; progress, warnings and errors to standard error.
"""
