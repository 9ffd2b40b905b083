"""What tcq needs of the machine: devices, processes, signals, files and log lines. Nothing here knows images or models."""
