from mmpipe.workflow import show_stage

show_stage(snakemake)  # noqa: F821 - provided by Snakemake
