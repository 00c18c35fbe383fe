"""Mathematics of training by rewards: pure functions of arrays, without networks.

`advantages` compares rewards with each other; `likelihood` has the log-probabilities of a
sampler's steps; `policy_gradient`, `step_pairs` and `prdp` have the losses on them; `pathwise`
samples with a gradient through the last steps.
"""
