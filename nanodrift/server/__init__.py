"""The HTTP front end: one process for HTTP and text (this package), another for the engine (engine_process.py).

``frames`` carries messages between the two; ``client`` is the HTTP side's end of it; ``protocol`` says what bodies
and answers look like; ``tokenizer`` and ``generation`` turn token events into text, ``replies`` sends it for as long
as somebody listens. ``app`` holds OpenAI's routes, ``tools`` the others and the page (page.html), ``served`` what
they share; ``guard`` stands before them all and ``connection`` below, ``admission`` says who would be late.
``telemetry`` counts, ``startup`` and ``dashboard`` report to people, ``logs`` to programs; ``options`` reads flags
and files, ``cli`` puts it together for serve.py. ``cluster`` does so for several GPUs or machines; deploy/ holds
examples for systemd and Docker.
"""
