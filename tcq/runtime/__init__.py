"""Access to the machine: devices, processes, signals, files and log lines.

Nothing here knows images or models.
"""
