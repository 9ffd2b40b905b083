"""Backbones, the retriever around them, and published weights."""
