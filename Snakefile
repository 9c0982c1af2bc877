# results/{recipe}/{stage}/model/...              a checkpoint; {recipe} owns the stage
# results/{recipe}/eval/{benchmark}/...           answers and score; {recipe} may read recipe@stage
# results/{recipe}/submit/{benchmark}.{ext}       the file a benchmark server accepts
# results/{benchmark}.json                        the comparison over the chosen recipes
# results/smoke/...                               the same, a few steps and questions long
# resources/{backbones,datasets,mixtures,benchmarks}/{name}/   what all of this is made from
from snakemake.utils import min_version

min_version("9.20")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


container: "envs/mmpipe.sif"


include: "rules/common.smk"
include: "rules/targets.smk"
include: "rules/fetch.smk"
include: "rules/mix.smk"
include: "rules/train.smk"
include: "rules/evaluate.smk"
include: "rules/report.smk"
