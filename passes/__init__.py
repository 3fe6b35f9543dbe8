"""The compiler: graph to facts, graph to graph.

Nothing here knows ``torch.compile``, user options or Triton.  A graph goes through
:func:`dartfx.passes.pipeline.run`; every step lives in the file named after it.
"""

if __name__ != "dartfx.passes":
    # From a checkout's root, plain ``passes`` would be a second copy of every class here.
    raise ImportError(f"import this package as 'dartfx.passes', not {__name__!r}")
