from mmpipe.jobs import show_tokens

show_tokens(snakemake)  # noqa: F821 - provided by Snakemake
