"""Cells, kinds and dependencies -> what a person wants to know of them: costs, differences, what blocks.

cost.py    operations, FLOPs and bytes of a kind; the memory of a plan
differ.py  why two kinds are not one
path.py    the critical path and the dependency that would have to go to shorten it
advice.py  what to change
places.py  where in the user's code something is
predict.py what a run would batch, without running it
figures.py figures for people
"""
