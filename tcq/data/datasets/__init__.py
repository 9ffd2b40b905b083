"""Datasets in the format of TFDS: prepared from published files, and read, without TensorFlow."""
