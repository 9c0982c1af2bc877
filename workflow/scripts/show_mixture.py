from mmpipe.jobs import show_mixture

show_mixture(snakemake)  # noqa: F821 - provided by Snakemake
