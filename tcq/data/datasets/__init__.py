"""Datasets in the format of TFDS: prepared from published files, read without TensorFlow."""
