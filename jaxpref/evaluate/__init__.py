"""`python -m jaxpref.evaluate`: compares any number of models on the same prompts and noise."""
