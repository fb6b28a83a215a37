"""The rolled program: a step captured once, any number of segments run from it.

The loop over segments stays in Python and runs as the user wrote it, but the step's tensor work is
*deferred*: every segment goes through Dynamo's guards, which choose the captured graph that this very
segment needs, and the graph's outputs are *tokens*, tensors with the right shape and no contents yet. What
a token will hold is known by identity wherever the step keeps it, so the dependencies between segments are
those of the values themselves. Cells run wave by wave as soon as no later segment can join their wave.

    capture.py   the step -> a functional graph with its inputs, outputs and writes
    program.py   that graph -> cells, glue in lumps, and what each reads
    values.py    deferred values and how the operands of a group are gathered
    kinds.py     the cells of all captured graphs -> kinds, batched forms, weight stacks
    run.py       one call: record segments, put cells into waves, run them, fill the tokens
    waves.py     running the cells of a wave, group by group or as one replay
    repeat.py    segments that do the same again, recorded without Dynamo
    score.py     a call written down
    follow.py    the run of a call that does what a score says
    fills.py     what a reset puts into the state, from its operations
    pages.py     a score as few launches
    scores.py    the scores that are kept
    session.py   what is known of one step from call to call
    view.py      what a stream sees of the step while others do not
    check.py     a rolled run against the sequential one, in figures
    summary.py   a run -> its report
    layout.py    segments in a layout that does not tell how many there are
    plain.py     the loop as it stands, from any state
    face.py      the module that ``transform(SegmentLoop(...))`` returns
    observe.py   which module runs one segment of a model's own loop
    writes.py    which memory an operation writes
    outer.py     a model's own loop, run as it stands while its step is deferred
    whole.py     the module that ``transform`` returns for a model with a loop of its own

Periodicity is never assumed: a segment that behaves otherwise fails a guard and is captured as what it is.
"""
