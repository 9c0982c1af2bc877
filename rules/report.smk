# What the HTML report shows. Nothing here changes a number.
localrules:
    show_training,
    show_checkpoint,
    show_mixture,
    show_tokens,
    show_overlap,
    show_samples,
    show_comparison,
    show_leaderboard,


rule show_training:
    input:
        "results/{smoke}{recipe}/{stage}/report/history.jsonl",
    output:
        report(
            "results/{smoke}{recipe}/{stage}/report/loss.svg",
            caption="../workflow/report/loss.rst",
            category="Training",
            labels={"recipe": "{recipe}", "stage": "{stage}", "shown": "curves"},
        ),
    log:
        "logs/{smoke}{recipe}/{stage}-curves.log",
    resources:
        **light(memory_gb=2, minutes=10),
    message:
        "Drawing the training of {wildcards.recipe}: {wildcards.stage}"
    script:
        "../workflow/scripts/show_training.py"


rule show_checkpoint:
    input:
        "results/{smoke}{recipe}/{stage}/model/manifest.json",
    output:
        report(
            "results/{smoke}{recipe}/{stage}/report/settings.html",
            caption="../workflow/report/settings.rst",
            category="Training",
            labels={"recipe": "{recipe}", "stage": "{stage}", "shown": "settings"},
        ),
    log:
        "logs/{smoke}{recipe}/{stage}-settings.log",
    resources:
        **light(memory_gb=2, minutes=10),
    message:
        "Laying out what {wildcards.recipe}: {wildcards.stage} was made from"
    script:
        "../workflow/scripts/show_checkpoint.py"


rule show_mixture:
    input:
        report="resources/mixtures/{mixture}/report.json",
    output:
        report(
            "resources/mixtures/{mixture}/report.html",
            caption="../workflow/report/mixture.rst",
            category="Data",
            labels={"mixture": "{mixture}", "shown": "records"},
        ),
    log:
        "logs/mix/{mixture}-report.log",
    resources:
        **light(memory_gb=2, minutes=10),
    message:
        "Laying out the verification of {wildcards.mixture}"
    script:
        "../workflow/scripts/show_mixture.py"


rule show_overlap:
    input:
        report="results/{smoke}overlap/{mixture}.json",
    output:
        report(
            "results/{smoke}overlap/{mixture}.html",
            caption="../workflow/report/overlap.rst",
            category="Data",
            labels={"mixture": "{mixture}", "shown": "overlap with benchmarks"},
        ),
    log:
        "logs/{smoke}overlap/{mixture}-report.log",
    resources:
        **light(memory_gb=2, minutes=10),
    message:
        "Laying out the overlap of {wildcards.mixture}"
    script:
        "../workflow/scripts/show_overlap.py"


rule show_tokens:
    input:
        report="resources/tokens/{mixture}/{key}/report.json",
    output:
        report(
            "resources/tokens/{mixture}/{key}/report.html",
            caption="../workflow/report/tokens.rst",
            category="Data",
            labels={"mixture": "{mixture}", "shown": "tokens"},
        ),
    log:
        "logs/tokens/{mixture}-{key}-report.log",
    wildcard_constraints:
        key="[0-9a-f]{12}",
    resources:
        **light(memory_gb=2, minutes=10),
    message:
        "Laying out the tokens of {wildcards.mixture}"
    script:
        "../workflow/scripts/show_tokens.py"


rule show_samples:
    input:
        questions="resources/{smoke}benchmarks/{benchmark}/questions.jsonl",
        answers="results/{smoke}{checkpoint}/eval/{benchmark}/answers.jsonl",
        per_item="results/{smoke}{checkpoint}/eval/{benchmark}/per_item.jsonl",
    output:
        report(
            "results/{smoke}{checkpoint}/eval/{benchmark}/samples.html",
            caption="../workflow/report/samples.rst",
            category="Answers",
            labels={"checkpoint": "{checkpoint}", "benchmark": "{benchmark}"},
        ),
    log:
        "logs/{smoke}{checkpoint}/eval/{benchmark}/samples.log",
    resources:
        **light(memory_gb=2, minutes=10),
    message:
        "Showing answers of {wildcards.checkpoint} to {wildcards.benchmark}"
    script:
        "../workflow/scripts/show_samples.py"


rule show_comparison:
    input:
        "results/{smoke}{benchmark}.json",
    output:
        report(
            "results/{smoke}{benchmark}.html",
            caption="../workflow/report/comparison.rst",
            category="Results",
            labels={"benchmark": "{benchmark}"},
        ),
    log:
        "logs/{smoke}compare/{benchmark}-report.log",
    resources:
        **light(memory_gb=2, minutes=10),
    message:
        "Laying out the comparison on {wildcards.benchmark}"
    script:
        "../workflow/scripts/show_comparison.py"


rule show_leaderboard:
    input:
        "results/{smoke}leaderboard.json",
    output:
        report(
            "results/{smoke}leaderboard.html",
            caption="../workflow/report/leaderboard.rst",
            category="Results",
            labels={"benchmark": "all"},
        ),
    log:
        "logs/{smoke}compare/leaderboard-report.log",
    resources:
        **light(memory_gb=2, minutes=10),
    message:
        "Laying out the ranking over all benchmarks"
    script:
        "../workflow/scripts/show_leaderboard.py"
