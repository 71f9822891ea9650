"""Fine-tuning of causal language models from YAML recipes.

The layers, lowest first; imports only point down (import-linter holds it, see pyproject.toml):

    errors       what went wrong, where, what to do; exit codes    cores   how many this process may use
    disk         what is written survives a crash of the machine
    recipe       what a user writes: the schema and its loader
    data         rows -> examples -> batches          model   base, targets, adapters
    evaluation   loss and perplexity                  weights safetensors files: merge, quantize, fingerprints
    training     the loop, its optimizer, checkpoints, run folder and display
    study        reads finished runs
    cli          one small file per verb: parse, call one function, print

``recipe`` and ``cli`` import neither torch nor anything that does at module level, so that ``--help`` and a refused
recipe answer at once.
"""

__version__ = "0.1.0"
