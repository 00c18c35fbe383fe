"""The shapes world: a miniature of text-to-image preference tuning whose truth is known.

Compositional captions (`prompts`), a renderer (`render`), the flaws of a web-like corpus
(`flaws`), a simulated annotator (`annotator`), a judge that sees only pixels
(`verifier`), and a tensorflow_datasets builder (`builder`) that writes it all down.
"""
