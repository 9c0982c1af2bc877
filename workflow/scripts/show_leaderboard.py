from mmpipe.jobs import show_leaderboard

show_leaderboard(snakemake)  # noqa: F821 - provided by Snakemake
