"""Sources of data rows, their encoding to latents, and the loader of batches."""
