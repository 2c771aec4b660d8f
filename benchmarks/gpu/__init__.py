"""The measuring script for GPUs, ``benchmarks/h200.py``, in parts: one module per stage.

``clock`` takes time, ``record`` keeps the JSON file, ``stage`` runs the items of one stage and
``supervise`` the process that does it, ``expected`` holds predictions and goals as data.
"""
