"""What the refactoring is compared with. Each module is one idea, with its source.

All of them run on the original model through transformers' experts interface, are fitted on
calibration text and keep a share of the experts' neurons; what differs is which. They are written
to be strong: thresholds are set on what the reduced layers before really hand over, and where a
paper leaves a choice open, the choice that loses least on calibration text is taken.
"""
