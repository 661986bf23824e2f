"""What a sample is: text today. A modality is all that sampling, scoring and showing have of their own.

The loop, the updaters and the estimators' caller know samples through `Modality` alone (`base.py`). Importing this
package needs no torch.
"""
