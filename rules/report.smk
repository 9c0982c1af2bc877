# Pages and figures of the HTML report. Nothing here changes a number. Each has a rule of its own, so that results whose pages were
# made by an earlier version are kept (docs/architecture.md).
localrules:
    report_items,
    show_training,
    show_checkpoint,
    show_mixture,
    show_tokens,
    show_contamination,
    show_samples,
    show_comparison,
    show_leaderboard,
    show_efficiency,


rule report_items:
    """Figures, tables and samples of the report."""
    input:
        PLAN.report_items(),


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
        "Plotting the training curves of {wildcards.recipe}: {wildcards.stage}"
    script:
        "../workflow/scripts/show.py"


use rule show_training as show_checkpoint with:
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
    message:
        "Writing the settings page of {wildcards.recipe}: {wildcards.stage}"


use rule show_training as show_mixture with:
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
    message:
        "Writing the verification page of {wildcards.mixture}"


use rule show_training as show_contamination with:
    input:
        report="results/{smoke}overlap/{mixture}.json",
    output:
        report(
            "results/{smoke}overlap/{mixture}.html",
            caption="../workflow/report/contamination.rst",
            category="Data",
            labels={"mixture": "{mixture}", "shown": "contamination"},
        ),
    log:
        "logs/{smoke}overlap/{mixture}-report.log",
    message:
        "Writing the contamination page of {wildcards.mixture}"


use rule show_training as show_tokens with:
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
    message:
        "Writing the token statistics of {wildcards.mixture}"


use rule show_training as show_samples with:
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
    message:
        "Writing sample answers of {wildcards.checkpoint} to {wildcards.benchmark}"


use rule show_training as show_comparison with:
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
    message:
        "Writing the comparison page of {wildcards.benchmark}"


use rule show_training as show_leaderboard with:
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
    message:
        "Writing the leaderboard page"


use rule show_training as show_efficiency with:
    input:
        "results/{smoke}{checkpoint}/efficiency/measured.json",
    output:
        table=report(
            "results/{smoke}{checkpoint}/efficiency/table.html",
            caption="../workflow/report/efficiency.rst",
            category="Sparsification",
            labels={"checkpoint": "{checkpoint}", "shown": "efficiency"},
        ),
        figure=report(
            "results/{smoke}{checkpoint}/efficiency/figure.svg",
            caption="../workflow/report/efficiency.rst",
            category="Sparsification",
            labels={"checkpoint": "{checkpoint}", "shown": "efficiency, plotted"},
        ),
    log:
        "logs/{smoke}{checkpoint}/efficiency-page.log",
    message:
        "Writing the efficiency page of {wildcards.checkpoint}"
