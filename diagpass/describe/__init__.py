"""Cells, kinds and dependencies -> what a person wants to know of them: costs, differences, what blocks.

    facts.py     the parts of a report that are the same for both paths to a program
    cost.py      operations, FLOPs and bytes of a kind
    work.py      matrix products by shape, and what is moved between them
    estimate.py  the cost model
    measured.py  a clock's spans as plain data
    differ.py    why two kinds are not one
    path.py      the critical path and the dependencies that would have to go to shorten it
    places.py    where in the user's code something is
    predict.py   what a run would batch, without running it
    advice.py    what to change
    figures.py   figures for people
    text.py      a report as plain text, for rich and as HTML
    progress.py  a bar or a line for long work

Everything here works on plain data and on types of ``ir.py``; nothing runs or compiles.
"""
