"""Reading images and datasets, and splitting them by protocol."""
