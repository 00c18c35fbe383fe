"""Mathematics of training by rewards: pure functions of arrays, without networks.

`advantages` compares rewards with each other; `likelihood` has the log-probabilities of a
sampler's steps, and `policy_gradient` losses on them; `two_pass` has the gradient of losses on
whole trajectories; `pathwise` samples with a gradient through the last steps.
"""
