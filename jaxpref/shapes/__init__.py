"""The shapes world: a small text-to-image task with known ground truth.

It has compositional captions (`prompts`), a renderer (`render`), the flaws of a web-like corpus
(`flaws`), a simulated annotator (`annotator`), a judge that sees only pixels (`verifier`), and
data sets of pairs (`builder`) and of ranked lists (`rankings`).
"""
