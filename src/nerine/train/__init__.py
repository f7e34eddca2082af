"""The trainer: a diffusion model is fine-tuned from a folder of pictures, on one machine or many.

`nerine train` is its door. Read it in this order: `settings` (every key), `batch` (what goes from file to loss),
`data/` (pictures, captions, buckets, caches), `families/` (how each kind of model is called), `objective` (noise and
loss), `optimizer`, and `loop`, which puts them together. Everything that is random comes from `randomness`.
"""
