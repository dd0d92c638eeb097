"""What the model is good for: incremental inference, generated text, surprise maps.

`engine` feeds a ByteLM byte by byte (`state`, `weights` and `chunks` are its parts), `generate` samples text from it,
`surprise` scores every byte of a file and shows where the bits went.
"""
