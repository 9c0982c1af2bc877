# Expert metrics, planned only with `log_experts` in the configuration, and the efficiency of sparsified checkpoints, planned
# only where one is chosen. Nothing here changes a result elsewhere.
localrules:
    gather_experts,
    analyse_answers,
    analyse_checkpoint,


ruleorder: answer_chunk_and_log > answer_chunk


# The answers of `answer_chunk`, and a log of the routers' choices. No params: enabling the log must not make answers stale, so
# its settings are part of the file name.
use rule answer_chunk as answer_chunk_and_log with:
    output:
        answers=temp("results/{smoke}{checkpoint}/eval/{benchmark}/chunks/{chunk}.jsonl"),
        experts=temp(
            f"results/{{smoke}}{{checkpoint}}/eval/{{benchmark}}/chunks/{{chunk}}{PLAN.expert_logs.chunk_ending}"
        ),
    wildcard_constraints:
        checkpoint=one_of(PLAN.expert_logs.checkpoints),
        benchmark=one_of(PLAN.expert_logs.benchmarks),


rule gather_experts:
    input:
        lambda wildcards: PLAN.expert_logs.chunk_files(out(wildcards), wildcards.checkpoint, wildcards.benchmark),
    output:
        "results/{smoke}{checkpoint}/eval/{benchmark}/experts.parquet",
    log:
        "logs/{smoke}{checkpoint}/eval/{benchmark}/gather-experts.log",
    resources:
        **light(memory_gb=8, minutes=60),
    params:
        spec=PLAN.expert_logs.spec(),
    message:
        "Gathering the expert log of {wildcards.checkpoint} on {wildcards.benchmark}"
    script:
        "../workflow/scripts/gather.py"


rule analyse_answers:
    input:
        lambda wildcards: PLAN.expert_logs.inputs(
            wildcards.family, out(wildcards), wildcards.checkpoint, wildcards.benchmark
        ),
    output:
        table="results/{smoke}{checkpoint}/eval/{benchmark}/experts/{family}.csv",
        figure=report(
            "results/{smoke}{checkpoint}/eval/{benchmark}/experts/{family}.svg",
            caption="../workflow/report/experts.rst",
            category="Experts",
            subcategory="{checkpoint}",
            labels={"benchmark": "{benchmark}", "shown": "{family}"},
        ),
    log:
        "logs/{smoke}{checkpoint}/eval/{benchmark}/experts-{family}.log",
    wildcard_constraints:
        family=one_of(PLAN.expert_logs.named(per="benchmark", runs_model=False)),
    resources:
        **light(memory_gb=8, minutes=60),
    message:
        "Analysing the experts of {wildcards.checkpoint} on {wildcards.benchmark}: {wildcards.family}"
    script:
        "../workflow/scripts/analyse.py"


use rule analyse_answers as analyse_checkpoint with:
    input:
        lambda wildcards: PLAN.expert_logs.inputs(wildcards.family, out(wildcards), wildcards.checkpoint),
    output:
        table="results/{smoke}{checkpoint}/experts/{family}.csv",
        figure=report(
            "results/{smoke}{checkpoint}/experts/{family}.svg",
            caption="../workflow/report/experts.rst",
            category="Experts",
            subcategory="{checkpoint}",
            labels={"benchmark": "all", "shown": "{family}"},
        ),
    log:
        "logs/{smoke}{checkpoint}/experts-{family}.log",
    wildcard_constraints:
        family=one_of(PLAN.expert_logs.named(per="checkpoint", runs_model=False)),
    message:
        "Analysing the experts of {wildcards.checkpoint}: {wildcards.family}"


use rule analyse_answers as run_experts with:
    log:
        "logs/{smoke}{checkpoint}/eval/{benchmark}/experts-{family}.log",
    wildcard_constraints:
        family=one_of(PLAN.expert_logs.named(per="benchmark", runs_model=True)),
    threads: lambda wildcards: answer_hardware(wildcards).cpus
    resources:
        **resources_of(answer_hardware),
    params:
        spec=PLAN.expert_logs.similarity_spec(),


# Times differ from run to run: only the page is made from them.
rule measure_efficiency:
    input:
        unpack(checkpoint_inputs),
        benchmark=f"resources/{{smoke}}benchmarks/{PLAN.efficiency.benchmark}/manifest.json",
    output:
        json="results/{smoke}{checkpoint}/efficiency/measured.json",
        csv="results/{smoke}{checkpoint}/efficiency/measured.csv",
    log:
        "logs/{smoke}{checkpoint}/efficiency.log",
    wildcard_constraints:
        checkpoint=one_of(PLAN.efficiency.all()),
    threads: lambda wildcards: answer_hardware(wildcards).cpus
    resources:
        **resources_of(answer_hardware),
    params:
        spec=PLAN.efficiency.spec(),
    message:
        "Measuring the efficiency of {wildcards.checkpoint}"
    script:
        "../workflow/scripts/measure_efficiency.py"


use rule measure_efficiency as map_retention with:
    input:
        unpack(checkpoint_inputs),
        benchmark="resources/{smoke}benchmarks/{benchmark}/manifest.json",
    output:
        json="results/{smoke}{checkpoint}/eval/{benchmark}/kept.json",
        page=report(
            "results/{smoke}{checkpoint}/eval/{benchmark}/kept.html",
            caption="../workflow/report/retention.rst",
            category="Sparsification",
            labels={"checkpoint": "{checkpoint}", "shown": "token retention on {benchmark}"},
        ),
    log:
        "logs/{smoke}{checkpoint}/eval/{benchmark}/kept.log",
    message:
        "Mapping the image tokens that {wildcards.checkpoint} retains on {wildcards.benchmark}"
