# Questions -> answers (in chunks) -> gathered answers -> score and submission -> comparison.
localrules:
    answers,
    scores,
    submissions,
    gather_answers,
    judge_answers,
    score_answers,
    convert_submission,
    compare,
    rank,


rule answers:
    """Answers to every chosen benchmark."""
    input:
        PLAN.per_checkpoint("answers.jsonl"),


rule scores:
    """Scores of every chosen benchmark."""
    input:
        PLAN.per_checkpoint("score.json"),


rule submissions:
    """Files for the benchmark servers."""
    input:
        PLAN.submissions(),


rule prepare_benchmark:
    input:
        lambda wildcards: PLAN.benchmark_inputs(wildcards.benchmark),
    output:
        questions="resources/{smoke}benchmarks/{benchmark}/questions.jsonl",
        references="resources/{smoke}benchmarks/{benchmark}/references.jsonl",
        manifest="resources/{smoke}benchmarks/{benchmark}/manifest.json",
    log:
        "logs/{smoke}prepare/{benchmark}.log",
    resources:
        **light(memory_gb=8, minutes=120),
    params:
        spec=lambda wildcards: PLAN.benchmark_spec(wildcards.benchmark, bool(wildcards.smoke)),
    message:
        "Preparing the questions of {wildcards.benchmark}"
    script:
        "../workflow/scripts/prepare_benchmark.py"


rule answer_chunk:
    input:
        unpack(checkpoint_inputs),
        benchmark="resources/{smoke}benchmarks/{benchmark}/manifest.json",
    output:
        temp("results/{smoke}{checkpoint}/eval/{benchmark}/chunks/{chunk}.jsonl"),
    log:
        "logs/{smoke}{checkpoint}/eval/{benchmark}/{chunk}.log",
    threads: lambda wildcards: answer_hardware(wildcards).cpus
    resources:
        **resources_of(answer_hardware),
    params:
        reads=lambda wildcards: PLAN.benchmark_spec(wildcards.benchmark, bool(wildcards.smoke)),
    message:
        "Answering {wildcards.benchmark} with {wildcards.checkpoint} ({wildcards.chunk})"
    script:
        "../workflow/scripts/answer.py"


rule gather_answers:
    input:
        chunks=lambda wildcards: PLAN.chunk_files(out(wildcards), wildcards.checkpoint, wildcards.benchmark),
        questions="resources/{smoke}benchmarks/{benchmark}/questions.jsonl",
    output:
        "results/{smoke}{checkpoint}/eval/{benchmark}/answers.jsonl",
    log:
        "logs/{smoke}{checkpoint}/eval/{benchmark}/gather.log",
    resources:
        **light(memory_gb=2, minutes=10),
    message:
        "Gathering the answers of {wildcards.checkpoint} to {wildcards.benchmark}"
    script:
        "../workflow/scripts/gather.py"


rule judge_answers:
    input:
        answers="results/{smoke}{checkpoint}/eval/{benchmark}/answers.jsonl",
        references="resources/{smoke}benchmarks/{benchmark}/references.jsonl",
    output:
        "results/{smoke}{checkpoint}/eval/{benchmark}/judge.jsonl",
    log:
        "logs/{smoke}{checkpoint}/eval/{benchmark}/judge.log",
    resources:
        **light(memory_gb=2, minutes=600),
    params:
        spec=lambda wildcards: PLAN.judge_spec(wildcards.benchmark),
    message:
        "Judging the answers of {wildcards.checkpoint} to {wildcards.benchmark}"
    script:
        "../workflow/scripts/judge.py"


rule score_answers:
    input:
        judge=lambda wildcards: PLAN.judge_files(out(wildcards), wildcards.checkpoint, wildcards.benchmark),
        answers="results/{smoke}{checkpoint}/eval/{benchmark}/answers.jsonl",
        references="resources/{smoke}benchmarks/{benchmark}/references.jsonl",
        checkpoint=lambda wildcards: checkpoint_inputs(wildcards)["checkpoint"],
    output:
        score="results/{smoke}{checkpoint}/eval/{benchmark}/score.json",
        per_item="results/{smoke}{checkpoint}/eval/{benchmark}/per_item.jsonl",
    log:
        "logs/{smoke}{checkpoint}/eval/{benchmark}/score.log",
    resources:
        **light(memory_gb=2, minutes=10),
    params:
        reads=lambda wildcards: PLAN.benchmark_spec(wildcards.benchmark, bool(wildcards.smoke)),
    message:
        "Scoring {wildcards.checkpoint} on {wildcards.benchmark}"
    script:
        "../workflow/scripts/score.py"


rule convert_submission:
    input:
        answers="results/{smoke}{checkpoint}/eval/{benchmark}/answers.jsonl",
        references="resources/{smoke}benchmarks/{benchmark}/references.jsonl",
    output:
        "results/{smoke}{checkpoint}/submit/{benchmark}.{extension}",
    log:
        "logs/{smoke}{checkpoint}/submit/{benchmark}.{extension}.log",
    wildcard_constraints:
        extension="xlsx|json|jsonl|zip|txt",
    resources:
        **light(memory_gb=2, minutes=10),
    params:
        reads=lambda wildcards: PLAN.benchmark_spec(wildcards.benchmark, bool(wildcards.smoke)),
    message:
        "Writing the submission of {wildcards.checkpoint} to {wildcards.benchmark}"
    script:
        "../workflow/scripts/convert.py"


rule compare:
    input:
        scores=lambda wildcards: PLAN.score_files(out(wildcards), wildcards.benchmark),
    output:
        json="results/{smoke}{benchmark}.json",
    log:
        "logs/{smoke}compare/{benchmark}.log",
    resources:
        **light(memory_gb=2, minutes=10),
    params:
        published=lambda wildcards: PLAN.published(wildcards.benchmark),
        reads=lambda wildcards: PLAN.comparison_spec(wildcards.benchmark),
    message:
        "Comparing the chosen checkpoints on {wildcards.benchmark}"
    script:
        "../workflow/scripts/compare.py"


rule rank:
    input:
        lambda wildcards: PLAN.leaderboard_files(out(wildcards)),
    output:
        json="results/{smoke}leaderboard.json",
        csv="results/{smoke}leaderboard.csv",
    log:
        "logs/{smoke}compare/leaderboard.log",
    resources:
        **light(memory_gb=4, minutes=60),
    params:
        reads=PLAN.ranking_spec(),
    message:
        "Ranking the chosen checkpoints on all benchmarks"
    script:
        "../workflow/scripts/compare.py"
