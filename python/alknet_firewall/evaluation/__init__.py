"""What a detector does with text, and pages that show it.

`measure` asks a compiled detector: how much gets past it in disguise (`transforms`) or in long
documents, and how long it takes. `report` makes one page of that and of what
`calibration.evaluate` measured on left-out sources; it needs the ``[report]`` extra.
"""
