"""Measurements that anyone can repeat: `python -m benchmarks.<name> [--quick] [--json]`.

Every figure in the documentation comes from here. Ours and the peer run alternately in the same session, figures are
medians and ratios, and the report carries versions and hardware.
"""
