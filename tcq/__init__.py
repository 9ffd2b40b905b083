"""tcq: unlabelled images in, a compact searchable index out.

Importing this package is light: jax, flax and everything else is imported by the module that uses it.
"""

__version__ = "0.1.0"
