"""Fine-tuning of causal language models from YAML recipes.

The layers, lowest first. A layer imports only from lower ones (import-linter enforces it, see pyproject.toml):

    control_groups  where Linux limits the memory and CPU time of containers, jobs and services
    errors       what went wrong, where, what to do; exit codes    cores   how many cores this process may use
    disk         files and folders that survive a crash of the machine
    recipe       what a user writes: the schema and its loader
    data         rows -> examples -> batches          model   base, targets, adapters
    evaluation   loss and perplexity                  weights safetensors files: merge, quantize, fingerprints
    training     the loop, its optimizer, checkpoints, run folder and display
    study        reads finished runs and models: reports, perplexity, verified merges
    cli          one small file per command: parse, call one function, print

At module level ``recipe`` and ``cli`` import neither torch nor anything that imports torch, so that ``--help`` and
errors in a recipe appear at once.
"""

__version__ = "0.1.0"
