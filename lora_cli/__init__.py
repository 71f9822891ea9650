"""Fine-tuning of causal language models from YAML recipes.

The layers, lowest first. A layer imports only from lower ones; display, recipe and system, data and model, evaluation
and weights do not import each other. import-linter enforces this, and the order inside model, weights and training:
pyproject.toml lists their modules, highest first.

    errors       what went wrong, where, what to do; exit codes
    display      progress for people, lines for logs
    recipe       what a user writes: the schema and its loader
    system       memory, cores, disk, and files and folders that appear complete or not at all
    data         rows -> examples -> batches
    model        base, targets, adapters; fast paths through them
    evaluation   loss and perplexity
    weights      tensor by tensor: merge, quantize; files, what PEFT saves of an adapter, and algebra on it
    training     the loop and what it needs: run (the folder, checkpoints), memory, distributed (several processes)
    study        reads finished runs and models: reports, perplexity, verified merges
    cli          one small file per command: parse, call one function, print

At module level ``recipe`` and ``cli`` import neither torch nor anything that imports torch, so that ``--help`` and
errors in a recipe appear at once.
"""

__version__ = "0.1.0"
