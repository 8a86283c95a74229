"""The arithmetic of a step as one kernel for a list of tensors, beside the tensor code of ``importances.py``.

Kernel and tensor code agree to rounding. A weight is dropped by one and kept by the other only where its random number
lies within rounding of its keep probability.
"""
