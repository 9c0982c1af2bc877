"""Benchmarks, one file each: questions, prompt, submission file and score."""
