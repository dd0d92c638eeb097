"""Artifacts: weights in a small checked file, and back.

`store` decides how each tensor is kept, `packing` compresses, `container` is the file; `load` gives the model back,
`export` makes an artifact of a run and says what it cost.
"""
