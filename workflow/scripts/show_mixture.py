from mmpipe.workflow import show_mixture

show_mixture(snakemake)  # noqa: F821 - provided by Snakemake
