# What sparsified checkpoints save and keep. Nothing here changes a number elsewhere; planned only where one is chosen.
localrules:
    show_efficiency,


# times differ from run to run: nothing but the page may be made from them
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
        "Measuring what {wildcards.checkpoint} saves"
    script:
        "../workflow/scripts/measure_efficiency.py"


rule show_efficiency:
    input:
        "results/{smoke}{checkpoint}/efficiency/measured.json",
    output:
        table=report(
            "results/{smoke}{checkpoint}/efficiency/table.html",
            caption="../workflow/report/efficiency.rst",
            category="Sparsification",
            labels={"checkpoint": "{checkpoint}", "shown": "savings"},
        ),
        figure=report(
            "results/{smoke}{checkpoint}/efficiency/figure.svg",
            caption="../workflow/report/efficiency.rst",
            category="Sparsification",
            labels={"checkpoint": "{checkpoint}", "shown": "savings, drawn"},
        ),
    log:
        "logs/{smoke}{checkpoint}/efficiency-page.log",
    resources:
        **light(memory_gb=2, minutes=10),
    message:
        "Laying out what {wildcards.checkpoint} saves"
    script:
        "../workflow/scripts/show_efficiency.py"


rule map_kept:
    input:
        unpack(checkpoint_inputs),
        benchmark="resources/{smoke}benchmarks/{benchmark}/manifest.json",
    output:
        json="results/{smoke}{checkpoint}/eval/{benchmark}/kept.json",
        page=report(
            "results/{smoke}{checkpoint}/eval/{benchmark}/kept.html",
            caption="../workflow/report/kept.rst",
            category="Sparsification",
            labels={"checkpoint": "{checkpoint}", "shown": "what is kept, {benchmark}"},
        ),
    log:
        "logs/{smoke}{checkpoint}/eval/{benchmark}/kept.log",
    wildcard_constraints:
        checkpoint=one_of(PLAN.efficiency.all()),
    threads: lambda wildcards: answer_hardware(wildcards).cpus
    resources:
        **resources_of(answer_hardware),
    params:
        spec=PLAN.efficiency.spec(),
    message:
        "Showing what {wildcards.checkpoint} keeps of images of {wildcards.benchmark}"
    script:
        "../workflow/scripts/map_kept.py"
