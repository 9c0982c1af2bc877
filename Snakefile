# results/{recipe}/{stage}/model/...              a checkpoint; {recipe} owns the stage
# results/{recipe}/eval/{benchmark}/...           answers and score; {recipe} may read recipe@stage
# results/{recipe}/submit/{benchmark}.{ext}       the file a benchmark server accepts
# results/{benchmark}.json                        the comparison over the chosen recipes
# results/smoke/...                               the same, a few steps and questions long
# resources/{backbones,datasets,mixtures,benchmarks}/{name}/   what all of this is made from
import shlex
import sys

from snakemake.utils import min_version

# Snakemake puts the interpreter into shell commands without quotes (its issue 2645)
sys.executable = shlex.quote(sys.executable)

min_version("9.20")


include: "rules/plain_config.smk"


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


container: "envs/mmpipe.sif"


include: "rules/common.smk"


localrules:
    all,


# here and not beside the other targets: an included file cannot set the default target
rule all:
    """Everything: checkpoints, comparisons, submissions, and what the report shows."""
    input:
        [str(stage.manifest()) for stage in PLAN.chosen_stages()],
        [f"results/{benchmark}.json" for benchmark in PLAN.compared_benchmarks],
        PLAN.submissions(),
        PLAN.report_items(),


include: "rules/fetch.smk"
include: "rules/mix.smk"
include: "rules/train.smk"
include: "rules/evaluate.smk"
include: "rules/analyse.smk"
include: "rules/report.smk"


onstart:
    announce(workflow.dag.needrun_jobs())
