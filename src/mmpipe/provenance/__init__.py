"""What made each file: records beside the results, Snakemake's view of them, and locks of runs and jobs."""
